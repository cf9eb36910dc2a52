"""Tensors and configs of families, compared with transformers; for values: tests/integration/test_conversion.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from convert import families
from convert.families import FAMILIES, GateUp, Heads, Qkv, nemo_config, read_config
from convert.stored import Rows, Span, StoredTensor, blocks, stack
from prune_distill.errors import InputError
from prune_distill.model.hf_config import make_compatible
from prune_distill.model.hf_weights import expected_shapes
from prune_distill.schema import Family
from tests.helpers.models import LLAMA3_ROPE, MODELS, SMALL

SOURCES = {
    "qwen3": "Qwen3",
    "qwen2": "Qwen2",
    "llama": "Llama",
    "mistral": "Mistral",
    "nemotron": "Nemotron",
    "qwen3_moe": "Qwen3Moe",
}
# Minimal configs, without settings that have defaults in transformers.
LEAST = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 32,
    "num_attention_heads": 64,
    "vocab_size": 40,
    "max_position_embeddings": 128,
}
LEAST_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LEAST_OF = {"qwen3_moe": LEAST_MOE, "nemotron": {"num_key_value_heads": 8}}  # required by its class


def folder_of(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shapes_of(config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


def least(family: str, **values: Any) -> dict[str, Any]:
    return {"model_type": family, **LEAST, **LEAST_OF.get(family, {}), **values}


@pytest.mark.parametrize("name", MODELS)
def test_tensors_match_transformers(tmp_path: Path, name: str) -> None:
    family, more, _ = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **more})
    config.save_pretrained(tmp_path)
    assert expected_shapes(read_config(tmp_path)) == shapes_of(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_settings_have_the_defaults_of_transformers(tmp_path: Path, family: str) -> None:
    theirs = getattr(transformers, f"{SOURCES[family]}Config").from_dict(least(family))
    ours = read_config(folder_of(tmp_path, least(family)))
    assert expected_shapes(ours) == shapes_of(theirs)
    arguments = nemo_config(ours, "bfloat16").arguments
    assert arguments["layernorm_epsilon"] == getattr(theirs, "rms_norm_eps", None) or theirs.norm_eps
    assert arguments["rotary_base"] == theirs.rope_theta
    assert arguments["init_method_std"] == theirs.initializer_range
    assert arguments["share_embeddings_and_output_weights"] == theirs.tie_word_embeddings
    assert ours["max_position_embeddings"] == theirs.max_position_embeddings
    assert arguments.get("rotary_percent", 1) == getattr(theirs, "partial_rotary_factor", 1)
    window = getattr(theirs, "sliding_window", None)
    assert arguments.get("window_size") == ([window - 1, 0] if window else None)
    if family == "qwen3_moe":
        assert arguments["moe_router_pre_softmax"] is not theirs.norm_topk_prob


@pytest.mark.parametrize("kind", ["dtype", "torch_dtype", None])
def test_the_type_of_the_weights_is_not_taken_from_the_config(tmp_path: Path, kind: str | None) -> None:
    config = read_config(folder_of(tmp_path, least("llama", **({kind: "float32"} if kind else {}))))
    arguments = nemo_config(config, "float16").arguments
    assert (arguments["bf16"], arguments["fp16"], arguments["params_dtype"].name) == (False, True, "float16")


def frequencies(config: dict[str, Any]) -> torch.Tensor:
    """Return the rotary frequencies that transformers computes for a config."""
    made = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made)
    inverse: torch.Tensor = type(model.model.rotary_emb)(made).inv_freq
    return inverse


@pytest.mark.parametrize("family", FAMILIES)
def test_nemo_gets_the_rope_settings_of_transformers(tmp_path: Path, family: str) -> None:
    """The type llama3, which Megatron implements itself, is compared by logits (tests/integration)."""
    for kind in ("default", *Family(family).traits.rope_kinds):
        scaling = {"default": {}, "linear": {"factor": 4.0}, "llama3": LLAMA3_ROPE}[kind]
        values = {"rope_parameters": {"rope_type": kind, "rope_theta": 7e4, **scaling}, "head_dim": 32}
        config = read_config(folder_of(tmp_path, least(family, **values)))
        arguments = nemo_config(config, "bfloat16").arguments
        found = frequencies(make_compatible(config))
        # megatron/core/models/common/embeddings/rotary_pos_embedding.py
        rotated = int(arguments["kv_channels"] * arguments.get("rotary_percent", 1.0))
        plain = arguments["rotary_base"] ** -(torch.arange(0, rotated, 2).float() / rotated)
        assert arguments["rotary_base"] == 7e4
        assert rotated == (16 if family == "nemotron" else 32)
        if kind == "llama3":
            assert (arguments["scale_factor"], arguments["old_context_len"]) == (8.0, 128)
            assert not torch.allclose(found, plain)
        else:
            torch.testing.assert_close(found, plain / (arguments["seq_len_interpolation_factor"] or 1))


def test_transformers_ignores_rope_scaling_of_nemotron() -> None:
    config = {**least("nemotron"), "head_dim": 32, "rope_theta": 7e4, "partial_rotary_factor": 0.5}
    scaled = {**config, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    torch.testing.assert_close(frequencies(scaled), frequencies(config))


def stored(path: Path, array: np.ndarray) -> StoredTensor:
    path.write_bytes(array.tobytes())
    return StoredTensor(path.name, "F32", array.shape, (Rows(len(array), (Span(path, 0, array[0].nbytes),)),))


def numbers(tensor: StoredTensor) -> np.ndarray:
    return np.frombuffer(b"".join(map(bytes, blocks(tensor))), np.float32).reshape(tensor.shape)


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (6, 6), (6, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_queries_keys_and_values_are_interleaved_by_group(tmp_path: Path, heads: int, groups: int, bias: bool) -> None:
    size, shape = 4, () if bias else (5,)
    rng = np.random.default_rng(0)
    q, k, v = (rng.random((count * size, *shape), np.float32) for count in (heads, groups, groups))
    by_group = (part.reshape(groups, -1, size, *shape) for part in (q, k, v))
    expected = np.concatenate(list(by_group), axis=1).reshape(-1, *shape)
    layout, division = Qkv(), Heads(heads, groups, size)
    parts = [stored(tmp_path / name, part) for name, part in (("q", q), ("k", k), ("v", v))]
    (matrix,) = layout.to_nemo(parts, division, "qkv")
    assert (matrix.name, matrix.shape) == ("qkv", expected.shape)
    np.testing.assert_array_equal(numbers(matrix), expected)
    back = layout.to_hf(matrix, division, ["q", "k", "v"])
    assert [tensor.name for tensor in back] == ["q", "k", "v"]
    for tensor, part in zip(back, (q, k, v), strict=True):
        np.testing.assert_array_equal(numbers(tensor), part)


def test_gate_and_up_projections_are_stacked(tmp_path: Path) -> None:
    gate, up = (np.random.default_rng(seed).random((3, 5), np.float32) for seed in (0, 1))
    parts = [stored(tmp_path / "gate", gate), stored(tmp_path / "up", up)]
    chunks = GateUp().to_nemo(parts, Heads(1, 1, 1), "fc1")
    assert len(chunks) == 2  # as Megatron saves them
    matrix = stack(chunks, "fc1")
    np.testing.assert_array_equal(numbers(matrix), np.vstack((gate, up)))
    for tensor, part in zip(GateUp().to_hf(matrix, Heads(1, 1, 1), []), (gate, up), strict=True):
        np.testing.assert_array_equal(numbers(tensor), part)


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        *(
            (name, {"attention_bias": True}, "attention_bias=true: ")
            for name in FAMILIES
            if name not in ("qwen2", "mistral")
        ),
        *((name, {"hidden_act": "gelu"}, 'hidden_act="gelu": ') for name in FAMILIES),
        *((name, {"use_sliding_window": True}, "some of the layers") for name in FAMILIES if name.startswith("qwen")),
        *((name, {"partial_rotary_factor": 0.5}, "whole heads") for name in FAMILIES if name != "nemotron"),
        *(
            (name, {"rope_scaling": {"rope_type": kind, "factor": 2.0}}, f'rope_type="?{kind}')
            for name in FAMILIES
            for kind in ("yarn", "dynamic", "longrope", "llama3")
        ),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: missing"),
        ("llama", {"mlp_bias": True}, "mlp_bias=true: "),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: "),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "some layers would have no experts"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "some layers would have no experts"),
        *(("qwen3_moe", {key: None}, f"{key}=null: ") for key in LEAST_MOE),
        *(("llama", {key: 0}, f"{key}=0: ") for key in LEAST),
        ("bert", {}, 'model_type="bert": .* qwen3, qwen2, llama'),
    ],
)
def test_settings_that_nemo_does_not_support_are_rejected(
    tmp_path: Path, family: Any, values: dict[str, Any], message: str
) -> None:
    config = least("llama") | {"model_type": family} if family not in list(FAMILIES) else least(family)
    with pytest.raises(InputError, match=rf"config\.json: .*{message}"):
        read_config(folder_of(tmp_path, {**config, **values}))


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_config(
            folder_of(
                tmp_path,
                least("qwen3", attention_bias=True, quantization_config={"bits": 4}, rope_scaling={"type": "yarn"}),
            )
        )
    named = ["attention_bias", "quantization_config", "rope_scaling.rope_type"]
    assert [re.split("[:=]", line.partition("json: ")[2])[0] for line in str(caught.value).splitlines()] == named


@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron", "qwen2"])
def test_every_hugging_face_tensor_is_used_once(name: str) -> None:
    family, more, _ = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **more}).to_dict()
    names = [hf for _, _, hf_names in families.parts(config) for hf in hf_names]
    assert len(names) == len(set(names)) == len(expected_shapes(config))
    places = [(rule.nemo, index) for rule, index, _ in families.parts(config)]
    assert len(places) == len(set(places))
