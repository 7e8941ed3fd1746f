"""The doctor's checks of GPUs on a real one: what this driver's libraries and nvidia-smi say is understood."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from v4forge.outcomes import OK
from v4forge.pipeline.doctor import checks as doctor_checks
from v4forge.pipeline.doctor.host import Host

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="there is no GPU here"),
]


def test_the_checks_of_gpus_understand_this_machine(tmp_path: Path) -> None:
    checks = [check for check in doctor_checks.CHECKS if check.group == "GPU"]
    rows = {row.name: row for row in doctor_checks.run(Host(tmp_path, "flash", runtime="host"), checks)}
    print(*(f"{row.status:<8} {row.name:<15} {row.fact}" for row in rows.values()), sep="\n")
    assert not [row for row in rows.values() if "the check itself broke" in row.fact]
    for name in ("driver", "CUDA", "GPUs", "capability", "GPU memory"):
        assert rows[name].status == OK or "nothing was verified" in rows[name].fact, rows[name]
