"""Rules of the group quantize."""

from __future__ import annotations

import pytest

from launch.planning.automatic import compose
from prune_distill.config.rules.quantize import linear_layers
from prune_distill.errors import ConfigError, Fault
from prune_distill.schema import Shape

TP2 = ("cluster.devices_per_node=2", "distill.parallel.tensor_model_parallel_size=2")


def find_faults(*overrides: str) -> list[Fault]:
    try:
        compose(["experiment=demo", *overrides])
    except ConfigError as error:
        return [fault for fault in error.faults if isinstance(fault, Fault)]
    return []


@pytest.mark.parametrize(
    ("overrides", "rule", "key", "fix"),
    [
        (["quantize.formats=[int4,int4]"], "quantize.formats", "quantize.formats", "set quantize.formats=[int4]"),
        (["quantize.formats=[nvfp4]"], "quantize.nvfp4", "quantize.formats", "cluster=one_node"),
        (["quantize.formats=[fp4]"], "value.choice", "quantize.formats[0]", "did you mean"),
        (
            ["quantize.formats=[fp8]", "quantize.calibration_seq_length=4096"],
            *("quantize.calibration_seq_length", "quantize.calibration_seq_length", "at most 2048"),
        ),
        (
            ["quantize.formats=[int4]", "quantize.int4_group_size=16"],
            *("quantize.int4_group_size", "quantize.int4_group_size", "32 or 64 or 128"),
        ),
        (
            ["quantize.formats=[int4]", "prune.ffn_hidden_size=448"],
            *("quantize.blocks", "quantize.int4_group_size", "FFN size 448; set quantize.int4_group_size to 32 or 64"),
        ),
        (
            ["quantize.formats=[int4]", "quantize.int4_group_size=64", "model.shape.kv_channels=24"],
            *("quantize.blocks", "quantize.int4_group_size", 'quantize.keep=["*.o_proj"]'),
        ),
        (["quantize.formats=[int8]", "quantize.keep=[mlp]"], "quantize.keep", "quantize.keep", "model.layers.0."),
        (
            ["quantize.formats=[int8]", 'quantize.keep=["*.q_proj"]'],
            *("quantize.keep", "quantize.keep", "keep all of them, or none"),
        ),
        (["distill.quantize=int4"], "distill.quantize", "distill.quantize", "set quantize.formats=[fp8,int4]"),
        (
            ["distill.quantize=int8", "quantize.formats=[int8]", "distill.precision=bf16", "distill.fp8=hybrid"],
            *("distill.quantize", "distill.quantize", "set one of the two to null"),
        ),
        (
            ["distill.quantize=fp8_tensor", "quantize.formats=[fp8_tensor]"],
            *("distill.quantize", "distill.quantize", "set distill.quantize to fp8 or int8 or int4"),
        ),
        (
            ["distill.quantize=int4", "quantize.formats=[int4]", *TP2],
            *("distill.quantize_split", "distill.parallel.tensor_model_parallel_size", "FFN size 640"),
        ),
    ],
)
def test_a_fault(overrides: list[str], rule: str, key: str, fix: str) -> None:
    (fault,) = find_faults(*overrides)
    assert (fault.rule, fault.keys[0]) == (rule, key)
    assert fix in str(fault)


@pytest.mark.parametrize(
    "overrides",
    [
        ["quantize.formats=[fp8,fp8_tensor,int8,int4]"],
        ["quantize.formats=[int8]", "prune.ffn_hidden_size=448"],
        ["quantize.formats=[int4]", "prune.ffn_hidden_size=448", 'quantize.keep=["*.down_proj"]'],
        ["quantize.formats=[int8]", "quantize.keep=[lm_head,model.layers.0.*]"],
        ["distill.quantize=int4", "quantize.formats=[int4,fp8]"],
        ["distill.quantize=int4", "quantize.formats=[int4]", "quantize.int4_group_size=32", *TP2],
        ["distill.quantize=int8", "quantize.formats=[int8]", *TP2],
        # Without formats, nothing of the group matters.
        [
            "quantize.formats=[]",
            "quantize.keep=[mlp]",
            "quantize.int4_group_size=16",
            "quantize.calibration_seq_length=4096",
        ],
    ],
)
def test_what_is_accepted(overrides: list[str]) -> None:
    assert find_faults(*overrides) == []


def test_mixtures_are_not_distilled_with_fake_quantization() -> None:
    experts = ("num_moe_experts=4", "moe_ffn_hidden_size=128", "moe_router_topk=2")
    mixture = ("model.family=qwen3_moe", *(f"model.shape.{size}" for size in experts), "prune.ffn_hidden_size=null")
    assert find_faults(*mixture, "quantize.formats=[int8]") == []
    (fault,) = find_faults(*mixture, "quantize.formats=[int8]", "distill.quantize=int8")
    assert (fault.rule, fault.keys[0]) == ("distill.quantize", "distill.quantize")


def test_layers_of_experts() -> None:
    shape = Shape(
        num_layers=1,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=24,
        num_moe_experts=2,
        moe_ffn_hidden_size=32,
    )
    sizes = {layer.name.removeprefix("model.layers.0."): layer.inputs for layer in linear_layers(shape, gated=True)}
    attention = {"self_attn.q_proj": 64, "self_attn.k_proj": 64, "self_attn.v_proj": 64, "self_attn.o_proj": 96}
    experts = {
        f"mlp.experts.{number}.{name}": inputs
        for number in range(2)
        for name, inputs in (("gate_proj", 64), ("up_proj", 64), ("down_proj", 32))
    }
    assert sizes == attention | experts
