"""The stages of the pipeline as data: program, inputs, settings, pins, outputs; and the profiles that fill them in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """Which model, and how much calibration."""

    source: str  # the upstream checkpoint; "" is what `fetch` downloads
    corpus: str  # a file; "" is the pinned data set, or the one that is named
    heldout: str  # text for `verify-deep`
    samples: int
    seq_len: int
    runtime: str


PROFILES = {
    "tiny": Profile("models/tiny", "models/tiny/calibration.jsonl", "models/tiny/heldout.txt", 64, 256, "host"),
    "flash": Profile("", "", "", 768, 512, "docker"),
}


@dataclass(frozen=True)
class Stage:
    """A program and what decides its outputs.

    `arguments` is a template over the settings and the folders {work} and {source}; a tuple in it is left out when the
    setting it names is empty. `inputs` and `outputs` are keys of FILES; `after` are the stages that write the inputs.
    """

    program: str
    does: str
    arguments: tuple[str | tuple[str, str], ...]
    inputs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()  # of the inputs, those that need not be there
    outputs: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    pins: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    concludes: bool = False  # its own last line ends the run
    parallel: bool = False  # runs as one process a GPU, which changes none of its outputs
    gpu: bool = False  # uses a GPU where there is one
    downloads: str = ""  # "always", or the setting that spares it the network
    reads: tuple[str, ...] = ()  # settings that name what it reads and what decides none of its outputs
    streams: bool = False  # begins on the first files of a source that is being downloaded
    beside: bool = False  # may run beside another stage
    does_all_of: str = ""  # a stage with the same output, which need not run where this one is up to date


# name -> path template and the files below it that do not belong to it.
FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "source": ("{source}", ()),
    "corpus": ("{corpus}", ()),
    "heldout": ("{heldout}", ()),
    "upstream": ("{work}/upstream", ()),
    "dequant": ("{work}/dequant", ()),
    "layers": ("{work}/layers", ("calibration.html",)),
    "layers-rtn": ("{work}/layers-rtn", ()),
    "layers-peer": ("{work}/layers-peer", ("calibration.html",)),
    # verify writes the certificate into the artifact, card what people read and how it was made.
    "artifact": ("{work}/artifact", ("certificate.json", "certificate.sig.json", "README.md", "run.json")),
    "artifact-rtn": ("{work}/artifact-rtn", ("certificate.json",)),
    "artifact/README.md": ("{work}/artifact/README.md", ()),
    "artifact/run.json": ("{work}/artifact/run.json", ()),
    "reports/card.html": ("{work}/reports/card.html", ()),
    "artifact/certificate.json": ("{work}/artifact/certificate.json", ()),
    "card templates": (
        "v4forge/reporting/templates",
        ("bench.html.j2", "calibration.html.j2", "layers.html.j2", "report.html.j2"),
    ),
    "page templates": ("v4forge/reporting/templates", ("model_card.md.j2", "card.html.j2", "calibration.html.j2")),
    "serving settings": ("docker/serve/settings.toml", ()),
    # What was measured, each as it was when the report was made.
    "reports": (
        "{work}/reports",
        ("index.html", "benchmarks.md", "figures.csv", "card.html", "run.json", "engines.json"),
    ),
    "reports/index.html": ("{work}/reports/index.html", ()),
    "reports/benchmarks.md": ("{work}/reports/benchmarks.md", ()),
    "reports/figures.csv": ("{work}/reports/figures.csv", ()),
    "published figures": ("v4forge/bench/data/published.toml", ()),
}

NUMERICS = ("TORCH_VERSION", "TRITON_VERSION", "TRANSFORMERS_VERSION", "COMPRESSED_TENSORS_VERSION")
STORAGE = ("TORCH_VERSION", "COMPRESSED_TENSORS_VERSION", "SAFETENSORS_VERSION")
CORPUS = ("CORPUS_REPO", "CORPUS_SPLIT", "CORPUS_REVISION", "TOKENIZERS_VERSION", "DATASETS_VERSION")
DEEP = 8192  # tokens that models/tiny's artifacts are compared on
CALIBRATE = (
    *("--source", "{source}", ("--corpus", "corpus"), ("--corpus", "data_set"), ("--bad-text", "bad_text")),
    *("--samples", "{samples}", "--seq-len", "{seq_len}", "--seed", "{seed}"),
    *("--recipe", "{recipe}", "--on-mismatch", "move"),
)

STAGES: dict[str, Stage] = {
    "fetch": Stage(
        program="scripts.fetch",
        does="downloading the upstream checkpoint",
        arguments=("--out", "{work}/upstream", ("--from", "from")),
        outputs=("upstream",),
        pins=("FLASH_REPO", "FLASH_REVISION"),
        downloads="from",
        reads=("from",),
        beside=True,
    ),
    "dequant": Stage(
        program="scripts.dequant",
        does="decoding the checkpoint to BF16",
        arguments=("--source", "{source}", "--out", "{work}/dequant"),
        inputs=("source",),
        outputs=("dequant",),
        pins=STORAGE,
        after=("fetch",),
    ),
    "calibrate": Stage(
        program="scripts.calibrate",
        does="GPTQ of the routed experts, {samples} x {seq_len} tokens",
        arguments=("--work", "{work}/layers", "--method", "gptq", *CALIBRATE),
        inputs=("source", "corpus"),
        outputs=("layers",),
        settings=("samples", "seq_len", "seed", "recipe", "data_set", "bad_text"),
        pins=(*NUMERICS, *CORPUS),
        after=("fetch",),
        parallel=True,
        gpu=True,
        downloads="corpus",
        streams=True,
    ),
    "postprocess": Stage(
        program="scripts.postprocess",
        does="writing the artifact",
        arguments=("--source", "{source}", "--work", "{work}/layers", "--out", "{work}/artifact"),
        inputs=("source", "layers"),
        outputs=("artifact",),
        pins=STORAGE,
        after=("calibrate",),
    ),
    "verify": Stage(
        program="scripts.verify",
        does="checking every tensor of the artifact",
        arguments=(
            *("--artifact", "{work}/artifact", "--source", "{source}", "--expect", "gptq"),
            *("--recipe", "{recipe}"),
        ),
        inputs=("source", "artifact"),
        outputs=("artifact/certificate.json",),
        settings=("recipe",),
        pins=STORAGE,
        after=("postprocess",),
        gpu=True,
    ),
    "card": Stage(
        program="scripts.card",
        does="writing the model card",
        arguments=("--work", "{work}", "--artifact", "{work}/artifact"),
        inputs=(
            *("artifact", "artifact/certificate.json", "reports", "layers"),
            *("card templates", "published figures", "serving settings"),
        ),
        optional=("reports", "layers"),
        outputs=("artifact/README.md", "artifact/run.json", "reports/card.html"),
        pins=("JINJA2_VERSION",),
        after=("verify",),
    ),
    "rtn": Stage(
        program="scripts.calibrate",
        does="round-to-nearest of the routed experts, to compare with",
        arguments=("--work", "{work}/layers-rtn", "--method", "rtn", *CALIBRATE),
        inputs=("source", "corpus"),
        outputs=("layers-rtn",),
        settings=("samples", "seq_len", "seed", "recipe", "data_set", "bad_text"),
        pins=(*NUMERICS, *CORPUS),
        after=("fetch",),
        parallel=True,
        gpu=True,
        downloads="corpus",
    ),
    "peer": Stage(
        program="scripts.calibrate",
        does="GPTQ by llm-compressor, to compare with",
        arguments=("--work", "{work}/layers-peer", "--method", "gptq", "--engine", "llmcompressor", *CALIBRATE),
        inputs=("source", "corpus"),
        outputs=("layers-peer",),
        settings=("samples", "seq_len", "seed", "recipe"),
        pins=(*NUMERICS, *CORPUS, "LLMCOMPRESSOR_VERSION"),
        after=("fetch",),
        parallel=True,
        gpu=True,
        downloads="corpus",
    ),
    "postprocess-rtn": Stage(
        program="scripts.postprocess",
        does="writing the round-to-nearest artifact",
        arguments=("--source", "{source}", "--work", "{work}/layers-rtn", "--out", "{work}/artifact-rtn"),
        inputs=("source", "layers-rtn"),
        outputs=("artifact-rtn",),
        pins=STORAGE,
        after=("rtn",),
    ),
    "verify-deep": Stage(
        program="scripts.verify",
        does="checking every tensor of the artifact, and how it and round-to-nearest predict beside the source",
        arguments=(
            *("--artifact", "{work}/artifact", "--source", "{source}", "--expect", "gptq", "--deep", "{deep}"),
            *("--recipe", "{recipe}", ("--heldout", "heldout"), "--beside", "{work}/artifact-rtn", "--threads", "2"),
        ),
        inputs=("source", "artifact", "artifact-rtn", "heldout"),
        outputs=("artifact/certificate.json",),
        settings=("recipe", "deep"),
        pins=(*NUMERICS, *STORAGE),
        after=("postprocess", "postprocess-rtn"),
        gpu=True,
        does_all_of="verify",
    ),
    "report": Stage(
        program="scripts.report",
        does="writing the report",
        arguments=("--work", "{work}"),
        inputs=(
            *("artifact/certificate.json", "layers", "layers-peer", "artifact", "reports"),
            *("published figures", "page templates"),
        ),
        optional=("reports", "layers-peer"),
        outputs=("reports/index.html", "reports/benchmarks.md", "reports/figures.csv"),
        pins=("JINJA2_VERSION", "RICH_VERSION", "MATPLOTLIB_VERSION"),
        after=("verify-deep",),
        concludes=True,
    ),
}


# The stages that are Make targets as stages; the others run as parts of `make demo`.
TARGETS = ("fetch", "dequant", "calibrate", "postprocess", "verify", "card", "peer")
