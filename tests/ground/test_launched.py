"""What the outside may say of ranks: torchrun a whole place, everybody else nothing."""

from __future__ import annotations

import pytest

from v4forge import launched
from v4forge.errors import UserError

WHOLE = {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "here",
    "MASTER_PORT": "29500",
}


def test_torchrun_gives_a_place() -> None:
    found = launched.place(WHOLE)
    assert found is not None and (found.rank, found.size, found.address, found.port) == (1, 2, "here", 29500)
    assert found.all_here and launched.rank(WHOLE) == 1 and launched.ignored(WHOLE) == ""


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "TORCHELASTIC_RUN_ID"])
@pytest.mark.parametrize("value", ["", "x", "-1", "²", "9" * 30])
def test_a_place_that_cannot_be_is_named(name: str, value: str) -> None:
    if name == "MASTER_ADDR" and value:
        return
    with pytest.raises(UserError, match=name):
        launched.place({**WHOLE, name: value})


def test_a_rank_is_one_of_its_run() -> None:
    with pytest.raises(UserError, match="RANK=2 is none of WORLD_SIZE=2"):
        launched.place({**WHOLE, "RANK": "2"})


@pytest.mark.parametrize("left", [{"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "2"}, {"MASTER_PORT": "x"}])
def test_anybody_else_gives_none(left: dict[str, str]) -> None:
    assert launched.place(left) is None and launched.rank(left) == 0
    assert "ignored" in launched.ignored(left) and all(f"{k}={v}" in launched.ignored(left) for k, v in left.items())
    assert launched.ignored({"PATH": "/bin"}) == ""


def test_what_we_start_gets_no_place() -> None:
    others = {"PET_NNODES": "2", "GROUP_RANK": "0", "ROLE_WORLD_SIZE": "1", "NODE_RANK": "0", "TORCHELASTIC_X": "1"}
    kept = {"PATH": "/bin", "MASTER": "x", "RANKING": "1", "OMP_NUM_THREADS": "1"}
    assert launched.without({**WHOLE, **others, **kept}) == kept


def test_an_interface_that_is_not_here_is_named() -> None:
    launched.check_interface({"GLOO_SOCKET_IFNAME": "lo"})
    with pytest.raises(UserError, match=r"GLOO_SOCKET_IFNAME=eth77: there is no eth77, but .*lo"):
        launched.check_interface({"GLOO_SOCKET_IFNAME": "eth77"})
