"""Fake quantizers in Megatron's linear layers, compared with formulas in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from prune_distill.nemo import backend

backend.activate()

from prune_distill.distillation.fake_quantizers import FakeQuantization  # noqa: E402
from prune_distill.schema import QuantFormat  # noqa: E402
from tests.helpers.one_rank import SHAPE, core_model, one_rank  # noqa: E402

GROUP = 32
SMALL = dataclasses.replace(SHAPE, num_layers=2)
FORMATS = (QuantFormat.fp8, QuantFormat.int8, QuantFormat.int4)
# Sums over 64 and 128 products in fp32 and float64.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with one_rank():
        yield


def quantized_model(quant_format: QuantFormat, *keep: str) -> Any:
    core = core_model(SMALL, modelopt_spec=True)
    FakeQuantization(quant_format, GROUP, keep).insert(core)
    return core


def round_values(values: Tensor, quant_format: QuantFormat) -> Tensor:
    """Round groups in the last axis, each to a format that its largest value fills."""
    largest = values.abs().amax(-1, keepdim=True)
    if quant_format is not QuantFormat.fp8:
        scale = largest / {QuantFormat.int8: 127, QuantFormat.int4: 7}[quant_format]
        return (values / scale).round() * scale
    # E4M3: a mantissa of 3 bits, exponents from -6, and 448 as the largest value.
    scaled = values / largest * 448
    step = 2.0 ** (scaled.abs().log2().floor().clamp_min(-6) - 3)
    return (scaled / step).round() * step * largest / 448


def expected_factors(x: Tensor, weight: Tensor, quant_format: QuantFormat) -> tuple[Tensor, Tensor]:
    """Return the rounded input and weight of a product, in float64."""
    x, weight = x.detach().double(), weight.detach().double()
    if quant_format is QuantFormat.int4:
        return x, round_values(weight.unflatten(-1, (-1, GROUP)), quant_format).flatten(1)
    return round_values(x, quant_format), round_values(weight, quant_format)


@pytest.mark.parametrize("name", ["self_attention.linear_qkv", "mlp.linear_fc2"])
@pytest.mark.parametrize("quant_format", FORMATS)
def test_a_layer_multiplies_rounded_factors_and_gradients_pass_the_rounding(
    quant_format: QuantFormat, name: str
) -> None:
    linear = quantized_model(quant_format).decoder.layers[1].get_submodule(name)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(6, 2, linear.weight.shape[1], generator=generator, requires_grad=True)
    output, _ = linear(x)
    rounded, weight = expected_factors(x, linear.weight, quant_format)
    torch.testing.assert_close(output.double(), rounded @ weight.T, **CLOSE)
    assert not torch.allclose(output, x @ linear.weight.T, **CLOSE)
    gradient = torch.randn(output.shape, generator=generator)
    output.backward(gradient)
    torch.testing.assert_close(x.grad.double(), gradient.double() @ weight, **CLOSE)
    expected = gradient.double().flatten(0, 1).T @ rounded.flatten(0, 1)
    torch.testing.assert_close(linear.weight.grad.double(), expected, **CLOSE)


@pytest.mark.parametrize("quant_format", FORMATS)
def test_zeros_stay_zeros(quant_format: QuantFormat) -> None:
    linear = quantized_model(quant_format).decoder.layers[0].mlp.linear_fc1
    with torch.no_grad():
        linear.weight[3] = 0
        output, _ = linear(torch.eye(4, 64).unsqueeze(1) * torch.tensor([0.0, 1, 1, 1])[:, None, None])
    assert output.isfinite().all()
    assert (output[0] == 0).all()
    assert (output[..., 3] == 0).all()


@pytest.mark.parametrize("quant_format", FORMATS)
def test_checkpoints_are_those_of_a_model_without_quantizers(quant_format: QuantFormat) -> None:
    """The keys of NeMo's own layers too, except for `_extra_state` of Transformer Engine's."""
    kinds = [core_model(SMALL), core_model(SMALL, modelopt_spec=True), quantized_model(quant_format)]
    nemo, plain, quantized = (
        {
            value.key: (type(value), getattr(value, "global_shape", None))
            for value in core.sharded_state_dict(prefix="module.").values()
        }
        for core in kinds
    )
    assert quantized == plain
    assert {key for key in quantized if "_extra_state" not in key} == {key for key in nemo if "_extra_state" not in key}


def test_kept_layers_compute_with_their_weights() -> None:
    core = quantized_model(QuantFormat.int8, "model.layers.1.*", "*.o_proj")
    quantized = {name.removesuffix(".weight_quantizer") for name, _ in core.named_modules() if "weight_q" in name}
    parts = ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
    assert quantized == {f"decoder.layers.0.{part}" for part in parts}
