"""A project for the tests of the runner: a fetch that waits for a word, a stage beside it, one that needs it all."""

from __future__ import annotations

from v4forge.pipeline.stages import Stage

# Brings config.json, is then ready, and brings a shard once a file named `go` is there; fails where `go` says so.
FETCH = """
import argparse, time
from pathlib import Path
from v4forge.checkpoint import incoming
parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path)
out = parser.parse_args().out
with incoming.marked(out) as ready:
    (out / "config.json").write_text(Path("v4forge/pipeline/flash_config.json").read_text())
    ready()
    while not Path("go").exists():
        time.sleep(0.05)
    if Path("go").read_text():
        raise SystemExit("error: " + Path("go").read_text())
    (out / "shard.safetensors").write_text("bytes")
"""
# Begins, says so, and waits for the shard as a reader of a checkpoint does.
CALIBRATE = """
import argparse
from pathlib import Path
from v4forge.checkpoint import incoming
from v4forge.errors import run_main
parser = argparse.ArgumentParser()
parser.add_argument("--source", type=Path)
parser.add_argument("--work", type=Path)
args = parser.parse_args()
Path("began").write_text("")
def main():
    incoming.wait_for(args.source / "shard.safetensors")
    args.work.mkdir(parents=True)
    (args.work / "layer-000.safetensors").write_text((args.source / "shard.safetensors").read_text())
run_main(main)
"""
TABLE = {
    "fetch": Stage(
        program="scripts.fake_fetch",
        does="downloading",
        arguments=("--out", "{work}/upstream"),
        outputs=("upstream",),
        downloads="from",
        beside=True,
    ),
    "calibrate": Stage(
        program="scripts.fake_calibrate",
        does="calibrating",
        arguments=("--source", "{source}", "--work", "{work}/layers"),
        inputs=("source",),
        outputs=("layers",),
        after=("fetch",),
        streams=True,
    ),
    "verify": Stage(
        program="scripts.fake_calibrate",
        does="verifying",
        arguments=("--source", "{source}", "--work", "{work}/artifact"),
        inputs=("source",),
        outputs=("artifact",),
        after=("fetch",),
    ),
}
