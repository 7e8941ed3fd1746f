"""Bytes, durations, rates and counts, as people read them."""

from __future__ import annotations

import pytest

from v4forge.units import counted, decimal_size, duration, pace, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
    ],
)
def test_durations_are_said_as_a_person_would(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "unit", "text"),
    [
        (1340.4, "MiB", "1,340 MiB/s"),
        (2.5, "prompts", "2.5 prompts/s"),
        (0.2325, "layers", "4.3 s a layer"),
        (0.01, "", "1 min 40 s each"),
        (25, "", "25/s"),
    ],
)
def test_slow_rates_are_said_as_time_a_step(rate: float, unit: str, text: str) -> None:
    assert pace(rate, unit) == text


@pytest.mark.parametrize(
    ("count", "unit", "text"),
    [(12, "layers", "12 layers"), (1, "layers", "1 layer"), (1234, "MiB", "1,234 MiB"), (3, "", "3")],
)
def test_one_of_many_loses_its_s(count: int, unit: str, text: str) -> None:
    assert counted(count, unit) == text


@pytest.mark.parametrize(("count", "text"), [(14 << 30, "14.0 GiB"), (24 << 20, "24 MiB"), (100 << 20, "100 MiB")])
def test_memory_is_said_in_powers_of_two(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("count", "least", "text"),
    [
        (159_600_000_000, "MB", "159.6 GB"),
        (1_500_000, "kB", "1.5 MB"),
        (1_234, "kB", "1.2 kB"),
        (1_234, "MB", "0.0 MB"),
        (12, "kB", "0.0 kB"),
        (12, "bytes", "12 bytes"),
        (0, "bytes", "0 bytes"),
    ],
)
def test_what_a_disk_holds_is_said_in_powers_of_ten(count: int, least: str, text: str) -> None:
    assert decimal_size(count, least) == text
