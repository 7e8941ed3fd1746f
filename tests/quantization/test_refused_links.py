"""postprocess where the file system makes no links, as many of networks and in user space: the same artifact."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from programs import contents, run_here
from synthetic import TINY

from v4forge.quantization import postprocess


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EPERM])
def test_layers_that_cannot_be_linked_are_copied(
    rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refused)
    arguments = ("--source", TINY, "--work", rounded / "layers", "--out", tmp_path / "artifact")
    assert run_here("postprocess", *arguments) == 0
    assert contents(tmp_path / "artifact") == contents(rounded / "artifact")


def test_copies_that_do_not_fit_are_refused_before_the_first(
    rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(postprocess, "can_link", lambda *_: False)
    monkeypatch.setattr(postprocess.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(1, 1, 0))
    arguments = ("--source", TINY, "--work", rounded / "layers", "--out", tmp_path / "artifact")
    assert run_here("postprocess", *arguments) == 1
    assert "takes no links to files of" in (said := capsys.readouterr().err) and "GB are missing" in said
    assert list((tmp_path / "artifact").glob("*")) == []
