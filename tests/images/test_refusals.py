"""What docker refuses becomes a fact and a command."""

from __future__ import annotations

import pytest

from v4forge.errors import UserError
from v4forge.images import refusals
from v4forge.images.refusals import Refusal, explained

OTHERWISE = UserError("something else", "docker info")


@pytest.mark.parametrize("refusal", refusals.OF_A_JOB)
def test_a_refused_container_is_told_by_what_the_daemon_said(refusal: Refusal) -> None:
    said = f"failed to create task: {refusal.pattern}: and the reason"
    words = {"said": said, "detail": f"{refusal.pattern}: and the reason"}
    error = explained(said, refusals.OF_A_JOB, OTHERWISE)
    assert (error.fact, error.hint) == (refusal.fact.format(**words), refusal.hint)


def test_the_first_of_the_known_refusals_is_meant_and_the_caller_names_whose_it_is() -> None:
    known = (Refusal("denied", "{host} says no", "docker login {host}"), Refusal("access", "never", "never"))
    error = explained("Access to it is DENIED", known, OTHERWISE, host="r.example")
    assert (error.fact, error.hint) == ("r.example says no", "docker login r.example")


def test_braces_in_what_docker_says_are_left_alone() -> None:
    said = 'no space left on device: {"id": 1}'
    assert explained(said, refusals.OF_A_JOB, OTHERWISE).fact == f"the disk of the docker daemon is full: {said}"


def test_what_nobody_foresaw_is_told_in_its_own_words() -> None:
    assert explained("the moon is in the wrong phase", refusals.OF_A_JOB, OTHERWISE) is OTHERWISE
    assert refusals.refused("{odd}").fact == "the docker daemon refused: {odd}"
