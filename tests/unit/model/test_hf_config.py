"""`config.json` files: both formats of transformers, wrong types, contradictions, and invalid files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from launch.planning.automatic import compose
from prune_distill.errors import ConfigError, InputError
from prune_distill.model.hf_config import MAX_BYTES, examine, make_compatible, read_config
from prune_distill.model.hf_shape import may_be_hub_id
from prune_distill.model.huggingface import copy_side_files
from tests.conftest import QWEN3

MIXTURE = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
NEMOTRON = {**QWEN3, "model_type": "nemotron"}
LLAMA = {**QWEN3, "model_type": "llama"}
LINEAR = {"rope_type": "linear", "factor": 2.0}


def write(folder: Path, content: object) -> Path:
    path = folder / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def faults_of(folder: Path, content: object) -> list[str]:
    """Return the faults without the path at the start of every line."""
    path = write(folder, content)
    _, faults = examine(path)
    assert all(fault.startswith(f"{path}: ") and "\n" not in fault and len(fault) < 400 for fault in faults)
    return [fault.removeprefix(f"{path}: ") for fault in faults]


@pytest.mark.parametrize(
    ("newer", "older"),
    [
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, {"rope_theta": 1e6, "rope_scaling": None}),
        ({"rope_parameters": {"rope_theta": 1e6}}, {"rope_theta": 1000000}),
        ({"rope_parameters": {"rope_theta": 7e4, **LINEAR}}, {"rope_theta": 7e4, "rope_scaling": LINEAR}),
        ({"rope_parameters": LINEAR}, {"rope_scaling": {"type": "linear", "factor": 2}}),
        ({"dtype": "float32"}, {"dtype": ..., "torch_dtype": "float32"}),
    ],
)
def test_both_formats_are_read_equally(tmp_path: Path, newer: dict[str, Any], older: dict[str, Any]) -> None:
    first, second = (
        read_config(write(tmp_path, {key: value for key, value in {**QWEN3, **form}.items() if value is not ...}))
        for form in (newer, older)
    )
    assert first == second
    # A file with both formats is read like either of them.
    assert read_config(write(tmp_path, make_compatible(first))) == first


def test_reading_and_writing(tmp_path: Path) -> None:
    written = {**LLAMA, "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 8}}
    config = read_config(write(tmp_path, written))
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert config["torch_dtype"] == "bfloat16"
    assert not config.keys() & {"dtype", "rope_parameters"}
    assert make_compatible(config) == {
        **config,
        "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
    }


def test_names_of_a_single_family(tmp_path: Path) -> None:
    mixture = {key: value for key, value in MIXTURE.items() if key != "num_experts"} | {"num_local_experts": 4}
    config = read_config(write(tmp_path, mixture))
    assert config["num_experts"] == 4
    assert "num_local_experts" not in config
    rope = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.25}
    config = read_config(write(tmp_path, {**NEMOTRON, "rope_parameters": rope}))
    assert config["partial_rotary_factor"] == 0.25
    assert make_compatible(config)["rope_parameters"] == rope


def test_defaults_of_missing_settings(tmp_path: Path) -> None:
    sizes = {key: value for key, value in LLAMA.items() if key not in ("head_dim", "num_key_value_heads")}
    config = read_config(write(tmp_path, {**sizes, "tie_word_embeddings": False}))
    assert (config["head_dim"], config["num_key_value_heads"], config["rope_theta"]) == (32, 4, 10000.0)
    config = read_config(write(tmp_path, {**LLAMA, "head_dim": None, "num_key_value_heads": None}))
    assert (config["head_dim"], config["num_key_value_heads"]) == (32, 4)
    del sizes["hidden_size"]
    assert faults_of(tmp_path, sizes) == ["hidden_size: missing; fetch the file again"]


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
            ["rope_theta=10000.0", "rope_parameters.rope_theta=1000000.0"],
        ),
        ({"rope_theta": 1e4, "rope_scaling": {**LINEAR, "rope_theta": 1e6}}, ["rope_scaling.rope_theta=1000000.0"]),
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}}, ["rope_scaling=", "rope_parameters="]),
        ({"rope_scaling": None, "rope_parameters": LINEAR}, ["rope_scaling=null", "rope_parameters="]),
        ({"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "factor": 4}}, ["rope_scaling=", "rope_parameters="]),
        ({"rope_scaling": {**LINEAR, "type": "yarn"}}, ["rope_scaling.rope_type=", 'rope_scaling.type="yarn"']),
        ({"torch_dtype": "float32"}, ['torch_dtype="float32"', 'dtype="bfloat16"']),
    ],
)
def test_two_values_of_one_setting_are_rejected(tmp_path: Path, content: dict[str, Any], keys: list[str]) -> None:
    (fault,) = faults_of(tmp_path, {**QWEN3, **content})
    for part in [*keys, "disagree"]:
        assert part in fault


HUGE = 10**4000
WRONG: list[tuple[str, object]] = [
    ("hidden_size", "128"),
    ("hidden_size", None),
    ("hidden_size", [128]),
    ("hidden_size", 128.0),
    ("hidden_size", True),
    ("hidden_size", -128),
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", 1e9),
    ("num_hidden_layers", 0),
    ("vocab_size", HUGE),
    ("head_dim", -1),
    ("head_dim", "64"),
    ("max_position_embeddings", {}),
    ("num_key_value_heads", "2"),
    ("rope_theta", "1e6"),
    ("rope_theta", float("nan")),
    ("rope_theta", float("inf")),
    ("rope_theta", HUGE),
    ("rope_theta", 0),
    ("rms_norm_eps", "1e-6"),
    ("rms_norm_eps", None),
    ("initializer_range", [0.02]),
    ("rope_scaling", "linear"),
    ("rope_scaling", []),
    ("rope_parameters", "default"),
    ("rope_scaling.factor", "2"),
    ("rope_scaling.factor", float("nan")),
    ("rope_scaling.factor", 0),
    ("rope_scaling.rope_type", None),
    ("rope_parameters.rope_theta", "1e6"),
    ("rope_parameters.full_attention", {"rope_theta": 1e6}),
    ("sliding_window", -5),
    ("sliding_window", "4096"),
    ("layer_types", "full_attention"),
    ("max_window_layers", "28"),
    ("tie_word_embeddings", "false"),
    ("tie_word_embeddings", 0),
    ("attention_bias", "false"),
    ("hidden_act", ["silu"]),
    ("torch_dtype", 16),
    ("dtype", "bf16"),
    ("attention_dropout", "0.0"),
    ("pad_token_id", "0"),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_wrong_type_or_range_is_one_line(tmp_path: Path, key: str, value: object) -> None:
    place, _, name = key.rpartition(".")
    change = {place: {"rope_type": "linear", "factor": 2.0, name: value}} if place else {key: value}
    (fault,) = faults_of(tmp_path, {**QWEN3, **change})
    assert fault.startswith(key)
    assert "; " in fault


@pytest.mark.parametrize(
    ("base", "change", "start"),
    [
        (MIXTURE, {"num_experts_per_tok": 5}, "num_experts_per_tok=5: "),
        (MIXTURE, {"num_experts_per_tok": 1, "norm_topk_prob": True}, "num_experts_per_tok=1: "),
        (MIXTURE, {"num_experts": "4"}, 'num_experts="4": '),
        (MIXTURE, {"num_experts": 4096, "num_hidden_layers": 1000}, "num_experts=4096: "),
        (MIXTURE, {"num_local_experts": "4"}, 'num_local_experts="4": '),
        (MIXTURE, {"num_local_experts": 8}, "num_experts=4 and num_local_experts=8 disagree"),
        (MIXTURE, {"norm_topk_prob": 1}, "norm_topk_prob=1: "),
        (QWEN3, {"num_key_value_heads": 3}, "num_key_value_heads=3: "),
        (LLAMA, {"hidden_size": 130, "head_dim": None}, "hidden_size=130: "),
        (QWEN3, {"head_dim": None}, "head_dim=null: "),
        (QWEN3, {"head_dim": 63}, "head_dim=63: "),
        (QWEN3, {"pad_token_id": 512}, "pad_token_id=512: "),
        (QWEN3, {"layer_types": ["full_attention"] * 3}, "layer_types: "),
        (QWEN3, {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types: "),
        (QWEN3, {"layer_types": [{}, [], 1, None]}, "layer_types: "),
        ({**QWEN3, "model_type": "mistral"}, {"sliding_window": 0}, "sliding_window=0: "),
        (NEMOTRON, {"partial_rotary_factor": None}, "partial_rotary_factor=null: "),
        (NEMOTRON, {"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5: "),
        (NEMOTRON, {"rope_scaling": LINEAR}, 'rope_scaling.rope_type="linear": transformers 4 ignores it'),
        (QWEN3, {"rope_scaling": {"factor": 2.0}}, 'rope_scaling={"factor": 2.0}: names no rope_type'),
        (QWEN3, {"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "auto_map: "),
        (QWEN3, {"quantization_config": {"bits": 4}}, "quantization_config: "),
        (QWEN3, {"model_type": ["qwen3"]}, 'model_type=["qwen3"]: '),
    ],
)
def test_contradictions_and_unsupported_settings_are_one_line(
    tmp_path: Path, base: dict[str, Any], change: dict[str, Any], start: str
) -> None:
    (fault,) = faults_of(tmp_path, {**base, **change})
    assert fault.startswith(start)


def test_one_expert_per_token_needs_a_variable_weight(tmp_path: Path) -> None:
    assert faults_of(tmp_path, {**MIXTURE, "num_experts_per_tok": 1, "norm_topk_prob": False}) == []


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON in UTF-8"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b"[]", "instead of an object"),
        (b"null", "instead of an object"),
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
        (b'{"a":' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"a":"' + b"x" * MAX_BYTES + b'"}', "larger than"),
        (b'{"model_type":' + b"[" * 900 + b"]" * 900 + b"}", "not a supported family"),
    ],
)
def test_invalid_files_are_one_line(tmp_path: Path, content: bytes, part: str) -> None:
    (fault,) = faults_of(tmp_path, content)
    assert part in fault


def test_special_files_are_rejected_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    (tmp_path / "file").touch()
    for path in (tmp_path / "config.json", tmp_path, tmp_path / "absent", tmp_path / "file" / "config.json"):
        with pytest.raises(InputError, match=str(path)):
            read_config(path)


def test_all_faults_are_reported_at_once_before_a_run_starts(tmp_path: Path) -> None:
    write(tmp_path, {**QWEN3, "hidden_size": "128", "num_hidden_layers": 10**9, "auto_map": {}})
    with pytest.raises(ConfigError) as caught:
        compose(["model=local", "name=mine", f"model.hf_path={tmp_path}", "data.train=[docs.jsonl]"], check_files=True)
    about = [message for fault in caught.value.faults if str(tmp_path) in (message := str(fault))]
    keys = [fault.removeprefix(f"{tmp_path / 'config.json'}: ").split("=")[0].split(":")[0] for fault in about]
    # Other missing files are in the same message.
    assert keys[:3] == ["auto_map", "num_hidden_layers", "hidden_size"]
    assert "has no tokenizer" in keys[3]
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("Qwen/Qwen3-8B", True),
        *((path, False) for path in ("/models/qwen", "./a/b", "~/qwen", "a/b/c", "qwen", "data/*.jsonl", "owner/", "")),
    ],
)
def test_what_looks_like_a_hub_id(path: str, expected: bool) -> None:
    assert may_be_hub_id(path) is expected


def test_side_files_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "additional_chat_templates").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "additional_chat_templates/tools.jinja", "model.safetensors"):
        (source / name).write_text(name)
    for _ in range(2):  # into a folder that has them already, too
        copy_side_files(source, target)
    copied = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    names = ["config.json", "tokenizer.json", "additional_chat_templates/tools.jinja"]
    assert copied == {name: name for name in names}
