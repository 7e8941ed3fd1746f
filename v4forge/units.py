"""Bytes, durations, rates and counts as people read them. Standard library only."""

from __future__ import annotations

KB, MB, GB = 10**3, 10**6, 10**9
MIB, GIB = 1 << 20, 1 << 30
UNIT_BYTES = {"bytes": 1, "MB": MB, "MiB": MIB, "GB": GB, "GiB": GIB}
DECIMAL = {"GB": GB, "MB": MB, "kB": KB, "bytes": 1}


def duration(seconds: float) -> str:
    """Seconds as a person says them: 8.4 s, 45 s, 3 min 08 s, 2 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02} min"


def counted(count: float, unit: str) -> str:
    """12 layers, 1 layer, 1,234 MiB; without a unit, the number."""
    if unit.endswith("s") and count == 1:
        unit = unit[:-1]
    return f"{count:,.0f} {unit}".rstrip()


def pace(rate: float, unit: str) -> str:
    """A rate in units a second in words: 1,340 MiB/s, or 4.3 s a layer where one takes longer than a second."""
    if rate >= 1:
        number = f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"
        return f"{number} {unit}/s" if unit else f"{number}/s"
    one = unit[:-1] if unit.endswith("s") else unit
    return f"{duration(1 / rate)} a {one}" if one else f"{duration(1 / rate)} each"


def size(count: int) -> str:
    """Memory: 14.2 GiB, 24 MiB."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / MIB:.0f} MiB"


def decimal_size(count: float, least: str = "MB") -> str:
    """What a disk holds, in powers of ten as its maker counts: 159.6 GB, 0.1 MB; in no smaller unit than `least`."""
    unit = next(unit for unit, one in DECIMAL.items() if count >= one or unit == least)
    return f"{count:,.0f} bytes" if unit == "bytes" else f"{count / DECIMAL[unit]:,.1f} {unit}"
