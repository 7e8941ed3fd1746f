"""benchmarks.routing: what a stand-in keeps of prompts."""

from __future__ import annotations

from benchmarks.routing import BLOCK, Replica


def prompt(*parts: str) -> str:
    return "".join(part * BLOCK for part in parts)


def test_a_replica_reads_what_follows_the_beginning_that_it_has() -> None:
    replica = Replica(0, 100 * BLOCK)
    assert replica.reads_anew(prompt("a", "b")) == 2 * BLOCK
    assert replica.reads_anew(prompt("a", "b", "c") + "d") == BLOCK + 1
    assert replica.reads_anew(prompt("x", "b", "c")) == 3 * BLOCK  # another beginning


def test_a_replica_forgets_what_was_used_longest_ago() -> None:
    replica = Replica(0, 2 * BLOCK)
    for letter in "abac":
        replica.reads_anew(prompt(letter))
    assert [replica.reads_anew(prompt(letter)) for letter in "ca"] == [0, 0]
    assert replica.reads_anew(prompt("b")) == BLOCK
