"""reporting.two_engines: what a comparison of two implementations of GPTQ comes to, in sentences and as a table."""

from __future__ import annotations

import pytest
from run_files import beside

from v4forge.reporting import page, two_engines
from v4forge.reporting.inputs import Inputs
from v4forge.reporting.tables import markdown_table


def test_two_that_agree_are_said_to_be_as_near_as_one_that_is_repeated() -> None:
    said = two_engines.said(beside((0.97, 0.002), (0.99, 0.00201)))
    assert said == [
        "98.00% of the codes of GPTQ and of GPTQ by llm-compressor 1.2.3 are equal, and 2 of 12 matrices to the last "
        "bit. GPTQ loses 0.2000% of the experts' output energy, GPTQ by llm-compressor 1.2.3 0.2005%, +0.25%.",
        "Each layer is as near as one of them, repeated on other hardware, has to be: 85% equal codes, losses within "
        "1%.",
    ]


@pytest.mark.parametrize(("far", "column"), [((0.80, 0.002), 1), ((0.97, 0.0021), 5)])
def test_a_layer_that_is_further_apart_is_named_and_marked(far: tuple[float, float], column: int) -> None:
    found = beside((0.97, 0.002), far)
    assert two_engines.said(found)[1].endswith("(85% equal codes, losses within 1%): layers 1.")
    rows = two_engines.table(found).rows
    assert [[i for i, cell in enumerate(row) if cell.mark] for row in rows] == [[], [column]]


@pytest.mark.parametrize(("equal", "shown"), [(1, "100.00%"), (0.999998, ">99.99%"), (0.99991, "99.99%")])
def test_codes_are_all_equal_only_where_each_is(equal: float, shown: str) -> None:
    found = beside((equal, 0.002))
    assert two_engines.table(found).rows[0][1].text == shown and two_engines.said(found)[0].startswith(f"{shown} of")


def test_what_else_differs_is_said() -> None:
    found = beside((0.97, 0.002), differing=("dampening", "calibration text")) | {"hardware": ["a CPU", "a GPU"]}
    assert two_engines.said(found)[2:] == [
        "They differ in more than whose GPTQ it is: dampening, calibration text.",
        "One on a CPU, the other on a GPU.",
    ]


def test_page_and_markdown_have_the_table() -> None:
    found = beside((0.97, 0.002))
    inputs = Inputs(engines=found)
    assert 'id="engines"' in page.page(inputs) and "97.00% of the codes" in page.page(inputs)
    assert markdown_table(two_engines.table(found)) in page.markdown(inputs)
    assert "Two implementations" not in page.page(Inputs())
