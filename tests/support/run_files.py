"""What the stages of a run leave, made up: certificate, manifest, run.json, the report of a layer."""

from __future__ import annotations

from typing import Any

SOURCE_FILES = {f"model-{i}.safetensors": {"sha256": f"{i}" * 64, "bytes": 9_000_000} for i in (1, 2)}


def around(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


DEEP = {  # of a certificate, by verify --deep with round-to-nearest beside
    "text": {"file": "heldout.txt", "sha256": "a" * 64},
    "unigram_perplexity": 306.5,
    "tokens": 16352,
    "sequences": 32,
    "seq_len": 512,
    "models": {
        name: {
            "perplexity": around(perplexity, 1.0),
            **(
                {
                    "perplexity_change_percent": around(100 * (perplexity / 10.0 - 1), 0.4),
                    "top1_agreement": around(same, 0.006),
                    "kl_nats": {"mean": around(kl, 0.002), "p99": 10 * kl},
                }
                if kl
                else {}
            ),
            "drafts": [
                {"k": k, "acceptance_after_accepted": around(acceptance - 0.1 * (k - 1), 0.02)} for k in (1, 2, 3)
            ],
            "bytes": size,
            "made": made,
        }
        for name, made, perplexity, kl, same, acceptance, size in (
            ("artifact", "GPTQ", 10.25, 0.011, 0.947, 0.59, 21_900_000),
            ("round-to-nearest", "round-to-nearest", 10.8, 0.024, 0.918, 0.57, 21_900_000),
            ("source", "source", 10.0, 0.0, 1.0, 0.60, 18_400_000),
        )
    },
}


CHECKS = [
    {"name": "tensors", "ok": True, "detail": "1,012 tensors"},
    {"name": "pass-through", "ok": True, "detail": "118 tensors equal"},
    {"name": "INT4 error", "ok": True, "detail": "96 matrices"},
]


RUN = {
    "verify": {"elapsed_s": 6.0, "started": "2026-01-01T00:02:00+00:00", "command": "python -m scripts.verify"},
    "calibrate": {"elapsed_s": 40.5, "started": "2026-01-01T00:00:00+00:00", "command": "python -m scripts.calibrate"},
}


MANIFEST = {
    "format": 1,
    "recipe": {
        "rules": [
            {"kind": "routed experts", "source": "fp4", "artifact": "int4"},
            {"kind": "everything else", "source": "bf16", "artifact": "bf16"},
        ]
    },
    "source": {"files": SOURCE_FILES},
    "calibration": {
        "settings": {"dampening": 0.01, "method": "gptq"},
        "code": {"calibration": "c" * 64, "chat": "d" * 64},
        "versions": {"torch": "2.x+cpu"},
        "corpus": {
            "sha256": "e" * 64,
            "origin": {"repo": "see https://example.org/corpus <b>"},
            "documents": list(range(50)),
            "samples": 64,
            "seq_len": 256,
        },
    },
    "layers": [{"layer": 0}],
    "files": {"layer-000.safetensors": {"sha256": "f" * 64, "bytes": 4_000_000}},
}


def layer(number: int, blended: bool = False, fallback: tuple[str, ...] = ()) -> dict[str, Any]:
    error = {"rtn": [0.02, 0.04], "rtn_same_scales": [0.009, 0.025], "gptq": [0.01, 0.02]}
    return {
        "layer": number,
        "attention": "CSA",
        "method": "gptq",
        "fingerprint": "ab",
        "tokens": [17, 900],
        "error": {kind: error for kind in ("w1", "w2", "w3")},
        "blended": [{"expert": 0, "tokens": 17, "inputs": "w1, w3"}] if blended else [],
        "fallback": list(fallback),
        "run": [
            {
                "seconds": {"sweep": 1.5, "Hessian": 1.0, "read": 0.25, "write": 0.5},
                "peak_gpu": 3 << 30,
                "peak_host": 1,
            },
            {
                "seconds": {"sweep": 1.0, "Hessian": 1.0, "read": 0.75, "write": 0.5},
                "peak_gpu": 1,
                "peak_host": 5 << 30,
            },
        ],
    }


def beside(*layers: tuple[float, float], differing: tuple[str, ...] = ()) -> dict[str, Any]:
    """reports/engines.json of two implementations of GPTQ: by layer the share of equal codes, and the other's loss,
    where ours is 0.002."""
    return {
        "fingerprints": ["a" * 64, "b" * 64],
        "engines": [
            {"made": "GPTQ", "engine": "v4forge", "version": None},
            {"made": "GPTQ by llm-compressor", "engine": "llmcompressor", "version": "1.2.3"},
        ],
        "differing": list(differing),
        "hardware": ["a CPU", "a CPU"],
        "layers": [
            {"layer": i, "equal_codes": equal, "identical": 1, "matrices": 6, "loss": [0.002, loss]}
            for i, (equal, loss) in enumerate(layers)
        ],
    }
