"""Contexts are written and read again; for reading with NeMo: tests/integration/test_conversion.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from convert.nemo_context import (
    Call,
    Reference,
    model_call,
    pickled_files,
    read_context,
    references,
    trusts_remote_code,
    write_context,
)
from prune_distill.errors import InputError

MODEL = Reference("nemo.collections.llm.gpt.model.qwen3", "Qwen3Model")
CONFIG = Reference("nemo.collections.llm.gpt.model.qwen3", "Qwen3Config")
ARGUMENTS = {"num_layers": 3, "kv_channels": 24, "rotary_base": 1e6, "bf16": True, "seq_len_interpolation_factor": None}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "context").mkdir()
    config = Call(
        CONFIG,
        {
            **ARGUMENTS,
            "params_dtype": Reference("torch", "bfloat16"),
            "window_size": [39, 0],
        },
    )
    write_context(tmp_path / "context", model_call(MODEL, config))
    return tmp_path


def change(checkpoint: Path, change_content: Callable[[dict[str, Any]], Any]) -> None:
    path = checkpoint / "context" / "io.json"
    content = json.loads(path.read_text())
    content = change_content(content) or content
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_the_model_round_trips(checkpoint: Path) -> None:
    record = read_context(checkpoint)
    assert record.config_class == "nemo.collections.llm.gpt.model.qwen3.Qwen3Config"
    assert record.config == ARGUMENTS  # the rest are no plain values


def test_all_objects_are_referenced_and_exist(checkpoint: Path) -> None:
    content = json.loads((checkpoint / "context" / "io.json").read_text())
    keys = {node["key"] for node in nodes(content) if node.get("type") == "ref"}
    assert keys == content["objects"].keys() == content["refcounts"].keys()


def nodes(value: Any) -> list[dict[str, Any]]:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [*([value] if isinstance(value, dict) else []), *(node for child in children for node in nodes(child))]


def test_model_yaml_says_the_same(checkpoint: Path) -> None:
    model = yaml.safe_load((checkpoint / "context" / "model.yaml").read_text())
    config = model["config"]
    assert model["_target_"] == f"{MODEL.module}.{MODEL.name}"
    assert ARGUMENTS.items() <= config.items()
    assert config["params_dtype"] == {"_target_": "torch.bfloat16", "_call_": False}
    assert config["window_size"] == [39, 0]


def test_imports_of_loading_are_listed(checkpoint: Path) -> None:
    found = references(checkpoint)
    assert {f"{MODEL.module}.Qwen3Model", "torch.bfloat16", "nemo.lightning.pytorch.trainer.Trainer"} <= found
    change(checkpoint, lambda content: content["objects"].update(more={"type": {"module": "os", "name": "system"}}))
    assert references(checkpoint) - found == {"os.system"}


def add_argument(value: Any) -> Callable[[dict[str, Any]], None]:
    """Return a change that adds an argument to the tokenizer."""

    def change_content(content: dict[str, Any]) -> None:
        objects = content["objects"]
        tokenizer = objects["autotokenizer_1"]
        tokenizer["items"].append(["Attr(name='use_fast')", value])  # Fiddle ignores this name
        names = objects[objects[tokenizer["metadata"]["key"]]["items"][1][1]["key"]]
        names["items"].append(["Index(index=1)", "trust_remote_code"])

    return change_content


@pytest.mark.parametrize(
    ("value", "trusts"),
    [
        ({"type": "leaf", "value": False}, False),
        ({"type": "leaf", "value": None}, False),
        (None, False),
        ({"type": "leaf", "value": True}, True),
        (True, True),
        ({"type": "leaf", "value": "yes"}, True),
        ({"type": "ref", "key": "list_1"}, True),
    ],
)
def test_trust_remote_code_is_detected(checkpoint: Path, value: Any, trusts: bool) -> None:
    assert not trusts_remote_code(checkpoint)
    change(checkpoint, add_argument(value))
    assert trusts_remote_code(checkpoint) == trusts


def test_contexts_with_unreadable_names_are_rejected(checkpoint: Path) -> None:
    def hide(content: dict[str, Any]) -> None:
        objects = content["objects"]
        names = objects[objects[objects["autotokenizer_1"]["metadata"]["key"]]["items"][1][1]["key"]]
        names["type"]["name"] = "dict"

    change(checkpoint, hide)
    with pytest.raises(InputError, match=r"io\.json is not in NeMo.s format"):
        trusts_remote_code(checkpoint)


@pytest.mark.parametrize("items", [3, [["alone"]], [3]])
def test_contexts_with_unreadable_objects_are_rejected(checkpoint: Path, items: Any) -> None:
    node = {"type": {"type": "pyref", "module": "nemo", "name": "M"}, "items": items}
    change(checkpoint, lambda content: content["objects"].update(more=node))
    with pytest.raises(InputError, match=r"io\.json is not in NeMo.s format"):
        pickled_files(checkpoint)


def test_unpickled_files_are_listed(checkpoint: Path) -> None:
    assert pickled_files(checkpoint) == set()
    plugin = {"type": "pyref", "module": "nemo.lightning.pytorch.plugins.mixed_precision", "name": "M"}
    for number, value in enumerate(({"type": "leaf", "value": "0f3a"}, "../../secret")):
        node = {"type": plugin, "items": [["IdentityElement()", value]], "metadata": None}
        change(checkpoint, lambda content, key=f"m_{number}", node=node: content["objects"].update({key: node}))
    assert pickled_files(checkpoint) == {"0f3a", "../../secret"}
    assert not trusts_remote_code(checkpoint)


@pytest.mark.parametrize(
    "change_content",
    [
        lambda content: "{",
        lambda content: "[" * 100_000,
        lambda content: "[]",
        lambda content: {"objects": {}},
        lambda content: content["objects"].pop("qwen3config_1") and None,
        lambda content: content["objects"]["qwen3config_1"].update(metadata={"key": "gone"}),
        lambda content: content["objects"]["qwen3config_1"].update(items=[["a"]]),
    ],
)
def test_a_context_without_a_model_is_rejected(checkpoint: Path, change_content: Callable[[Any], Any]) -> None:
    change(checkpoint, change_content)
    with pytest.raises(InputError, match=r"context/io\.json (does not describe a model|cannot be read)"):
        read_context(checkpoint)


def test_a_folder_without_a_context_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a NeMo checkpoint \(it has no context/io\.json\)"):
        read_context(tmp_path)
    with pytest.raises(InputError, match=r"io\.json cannot be read"):
        references(tmp_path)
