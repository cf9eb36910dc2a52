"""Headers of a model's weights are compared with its config.json when a run is composed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from launch.planning.automatic import compose
from prune_distill.errors import ConfigError
from prune_distill.model.hf_weights import INDEX, expected_shapes, faults
from tests.conftest import QWEN3
from tests.helpers.hf_folders import Shapes, write_safetensors, write_tokenizer


def folder(path: Path, shapes: Shapes, dtype: str = "BF16", config: dict[str, Any] = QWEN3, **types: str) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    write_safetensors(path / "model.safetensors", shapes, dtype, **types)
    return path


UNTIED = {**QWEN3, "tie_word_embeddings": False}
SHAPES = expected_shapes(UNTIED)
NORM = "model.layers.0.input_layernorm.weight"


def without(name: str) -> Shapes:
    return {other: shape for other, shape in SHAPES.items() if other != name}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_complete_model_has_no_faults(tmp_path: Path, dtype: str) -> None:
    assert faults(folder(tmp_path, SHAPES, dtype), UNTIED) == []


def test_allowed_extra_tensors(tmp_path: Path) -> None:
    tied = {**QWEN3, "tie_word_embeddings": True}
    extra = {**expected_shapes(tied), "model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}
    assert "lm_head.weight" not in extra
    assert faults(folder(tmp_path, extra), tied) == []
    assert faults(folder(tmp_path, {**extra, "lm_head.weight": SHAPES["lm_head.weight"]}), tied) == []


@pytest.mark.parametrize(
    ("shapes", "types", "parts"),
    [
        (without(NORM), {}, [f"lacks {NORM}, which config.json describes"]),
        (without("lm_head.weight"), {}, ["lacks lm_head.weight"]),
        ({f"base_model.{name}": shape for name, shape in SHAPES.items()}, {}, ["lacks model.", " more", "base_model."]),
        ({**SHAPES, "visual.patch.weight": (3, 4)}, {}, ["visual.patch.weight, not a tensor of model_type qwen3"]),
        ({**SHAPES, NORM: (8,)}, {}, [f"{NORM} [8] (config.json: [{QWEN3['hidden_size']}])"]),
        ({**SHAPES, NORM: ()}, {}, [f"{NORM} [] (config.json"]),
        (SHAPES, {NORM: "F32"}, ["several types (BF16, F32)"]),
        (SHAPES, {NORM: "F64"}, ["type F64 cannot be trained"]),
        (SHAPES, {NORM: "U8"}, ["type U8 cannot be trained"]),
        (SHAPES, {NORM: "F8_E4M3"}, ["quantized (tensors of type F8_E4M3)", "bf16"]),
        ({**SHAPES, "model.layers.0.mlp.up_proj.weight_scale": ()}, {}, ["quantized (", "up_proj.weight_scale)"]),
        ({**SHAPES, "model.layers.0.mlp.up_proj.qweight": (4,)}, {}, ["quantized (", "up_proj.qweight)"]),
    ],
)
def test_differences_from_config_json(tmp_path: Path, shapes: Shapes, types: dict[str, str], parts: list[str]) -> None:
    found = "\n".join(faults(folder(tmp_path, shapes, **types), UNTIED))
    assert str(tmp_path) in found
    for part in parts:
        assert part in found


def test_each_kind_of_difference_is_one_line(tmp_path: Path) -> None:
    shapes = {f"model.{name}": shape for name, shape in SHAPES.items()}
    found = faults(folder(tmp_path, {**shapes, NORM: (3,)}), UNTIED)
    assert len(found) == 3
    assert f"and {len(SHAPES) - 1 - 3} more" in found[0]


def test_a_billion_layers_are_rejected_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    assert "more than any model has" in faults(folder(tmp_path, SHAPES), {**UNTIED, "num_hidden_layers": 10**9})[0]
    assert time.monotonic() - started < 5


def test_pickled_weights_must_be_allowed(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "convert.allow_pickle=true" in faults(tmp_path, UNTIED)[0]
    assert faults(tmp_path, UNTIED, allow_pickle=True) == []


def shard(path: Path) -> None:
    """Split a folder's single file into two shards with an index."""
    (path / "model.safetensors").unlink()
    names, half = list(SHAPES), len(SHAPES) // 2
    parts = {"1.safetensors": names[:half], "2.safetensors": names[half:]}
    for file, part in parts.items():
        write_safetensors(path / file, {name: SHAPES[name] for name in part})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_launchers_report_faults_before_a_run_starts(tmp_path: Path) -> None:
    """In a local folder; reading the config alone does not check weights."""
    model = folder(tmp_path / "model", SHAPES, config=UNTIED)
    write_tokenizer(model)
    shard(model)
    documents = tmp_path / "docs.jsonl"
    documents.write_text("")
    sizes = ["prune.num_layers=1", "distill.seq_length=32", "evaluate.seq_length=32", "evaluate.verify_tokens=32"]
    sizes += ["prune.calibration_seq_length=32", "evaluate.sample_prompt_tokens=8", "evaluate.sample_new_tokens=8"]
    overrides = ["model=local", "model.family=qwen3", f"model.hf_path={model}", "name=a", "model.name=m", "data=jsonl"]
    overrides += [f"data.train=[{documents}]", f"run_dir={tmp_path}/run", *sizes]
    overrides += ["distill.parallel.tensor_model_parallel_size=1"]
    compose(overrides, check_files=True)
    (model / "2.safetensors").rename(model / "3.safetensors")
    compose(overrides)
    with pytest.raises(ConfigError) as caught:
        compose(overrides, check_files=True)
    (fault,) = map(str, caught.value.faults)
    assert fault.startswith(f"{model}: ")
    assert f"2.safetensors, which {INDEX} names, is missing" in fault
    (model / INDEX).unlink()
    with pytest.raises(ConfigError, match=r"1\.safetensors, 3\.safetensors are not named by an index"):
        compose(overrides, check_files=True)
