"""config.json and the index, as a person or a tool may have broken them: one fact, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic import config_dict, write_checkpoint

from v4forge.checkpoint import layout
from v4forge.checkpoint.reader import INDEX, Checkpoint
from v4forge.errors import UserError

# config.json of any content gives an error, never a traceback.
COUNTS = sorted(n for n in layout.Config.__dataclass_fields__ if n not in ("raw", "compress_ratios", "recipe"))


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [None, "4", 4.5, True, -1, [], {}])
def test_a_setting_of_a_wrong_type_is_named(name: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        layout.parse_config(config_dict() | {name: value}, "config.json")
    assert caught.value.fact == f"config.json: {name} is {value!r}, it must be a positive integer"


@pytest.mark.parametrize("name", [n for n in COUNTS if n != "num_hash_layers"])
def test_a_setting_of_zero_is_named(name: str) -> None:
    with pytest.raises(UserError) as caught:
        layout.parse_config(config_dict() | {name: 0}, "config.json")
    assert caught.value.fact == f"config.json: {name} is 0, it must be a positive integer"


@pytest.mark.parametrize(
    "value", [None, 4, "0404", {"0": 4}, [None, 0, 0, 0], ["4", 0, 0, 0], [[4], 0, 0, 0], [-4] * 4]
)
def test_compress_ratios_of_a_wrong_type_are_named(value: Any) -> None:
    with pytest.raises(UserError, match="compress_ratios is"):
        layout.parse_config(config_dict() | {"compress_ratios": value}, "config.json")


@pytest.mark.parametrize("raw", [None, [], "deepseek_v4", 4, {}])
def test_a_config_that_is_no_object_of_settings_is_refused(raw: Any) -> None:
    with pytest.raises(UserError, match=r"^config\.json: "):
        layout.parse_config(raw, "config.json")


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"num_hash_layers": 4}, "num_hash_layers is 4, more than num_hidden_layers, 3"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, more than n_routed_experts, 4"),
    ],
)
def test_a_part_larger_than_the_whole_is_refused(changes: dict[str, int], fact: str) -> None:
    with pytest.raises(UserError) as caught:
        layout.parse_config(config_dict() | changes, "config.json")
    assert caught.value.fact == f"config.json: {fact}"


def test_all_layers_may_be_hashed_and_all_experts_be_used(tmp_path: Path) -> None:
    changes = {"num_hash_layers": 3, "num_experts_per_tok": 4}
    config = write_checkpoint(tmp_path, **changes)
    source = Checkpoint(tmp_path)
    source.validate(layout.upstream(config))
    assert layout.parse_config(config_dict() | {"num_hash_layers": 0}, "config.json").num_hash_layers == 0


@pytest.mark.parametrize(
    "weight_map", [["a"], None, "a", 3, {"a": None}, {"a": 3}, {"a": ["b"]}, {"a": "../b"}, {"a": "/b"}, {"a": ""}]
)
def test_an_index_of_a_wrong_form_is_refused(tmp_path: Path, weight_map: Any) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError) as caught:
        Checkpoint(tmp_path)
    assert caught.value.fact == f"{tmp_path / INDEX} is not a safetensors index"


def test_an_index_or_config_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX).mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        layout.load_config(tmp_path)
