"""docs/tour.ipynb as it is saved: with what one run of all its cells showed. That they run is for `make docs`."""

from __future__ import annotations

import json

from v4forge.checkout import ROOT

CELLS = json.loads((ROOT / "docs/tour.ipynb").read_text(encoding="utf-8"))["cells"]


def test_it_is_saved_with_the_outputs_of_one_run() -> None:
    cells = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    said = "".join("".join(output.get("text", "")) for output in outputs)
    assert "ok: True" in said and "ignored" not in said
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}


def test_no_line_of_it_is_cut_by_the_page() -> None:
    lines = [line.rstrip("\n") for cell in CELLS if cell["cell_type"] == "code" for line in cell["source"]]
    assert [line for line in lines if len(line) > 78] == []
