"""The stand-in's FP8 against a formula in float64, and Megatron's config turning it on.

Sharded layers: tests/integration/test_fp8.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

if torch.cuda.is_available():
    pytest.skip("the stand-in is for machines without CUDA", allow_module_level=True)

from prune_distill.errors import ConfigError
from prune_distill.nemo import backend

backend.activate()

import transformer_engine.pytorch as te  # noqa: E402
from megatron.core.fp8_utils import get_fp8_context  # noqa: E402
from transformer_engine.common.recipe import (  # noqa: E402
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    Recipe,
)
from transformer_engine.pytorch.distributed import checkpoint  # noqa: E402
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager  # noqa: E402

from prune_distill.nemo.precision import match_precision, require_fp8  # noqa: E402
from prune_distill.schema import Fp8, Precision  # noqa: E402
from tests.helpers.one_rank import VOCABULARY, config, core_model, one_rank, positions  # noqa: E402

RECIPES = [Float8CurrentScaling(), Float8BlockScaling(), Float8BlockScaling(fp8_format=Format.HYBRID)]
NAMES = ["current", "block", "block_hybrid"]
# Products of equal operands, summed in fp32 here and in float64 there.
SUMS = {"rtol": 1e-5, "atol": 1e-5}
# Number of mantissa bits and smallest exponent of each format, and its largest number.
E4M3, E5M2 = (3, -6, 448.0), (2, -14, 57344.0)
Rows = Callable[[np.ndarray], np.ndarray]


def round_to(values: np.ndarray, bits: int, least: int, largest: float) -> np.ndarray:
    """Round to the nearest number with so many mantissa bits, ties to even."""
    exponents = np.maximum(np.floor(np.log2(np.maximum(np.abs(values), 1e-300))), least)
    step = 2.0 ** (exponents - bits)
    return np.clip(np.round(values / step) * step, -largest, largest)


def quantize(values: np.ndarray, amax: np.ndarray, kind: tuple[int, int, float], power_of_two: bool) -> np.ndarray:
    scale = np.where(amax == 0, 1.0, kind[2] / np.where(amax == 0, 1.0, amax))
    scale = 2.0 ** np.floor(np.log2(scale)) if power_of_two else np.float64(np.float32(scale))
    return round_to(values * scale, *kind) / scale


def by_tensor(values: np.ndarray, kind: tuple[int, int, float]) -> np.ndarray:
    return quantize(values, np.abs(values).max(), kind, power_of_two=False)


def by_block(values: np.ndarray, kind: tuple[int, int, float], rows: int, columns: int) -> np.ndarray:
    found = np.empty_like(values)
    for top in range(0, values.shape[0], rows):
        for left in range(0, values.shape[1], columns):
            block = values[top : top + rows, left : left + columns]
            found[top : top + rows, left : left + columns] = quantize(block, np.abs(block).max(), kind, True)
    return found


def linear_by_hand(x: Tensor, weight: Tensor, grad: Tensor, recipe: Recipe) -> list[np.ndarray]:
    """Output and gradients of input and weight in float64.

    Args:
        x, weight, grad: `[tokens, in]`, `[out, in]` and `[tokens, out]`.
    """
    a, w, g = (tensor.detach().double().numpy() for tensor in (x, weight, grad))
    backward = E5M2 if recipe.fp8_format is Format.HYBRID else E4M3
    if isinstance(recipe, Float8CurrentScaling):
        a_row = a_column = by_tensor(a, E4M3)
        g_row = g_column = by_tensor(g, backward)
        w = by_tensor(w, E4M3)
    else:
        a_row, a_column = by_block(a, E4M3, 1, 128), by_block(a, E4M3, 128, 1)
        g_row, g_column = by_block(g, backward, 1, 128), by_block(g, backward, 128, 1)
        w = by_block(w, E4M3, 128, 128)
    return [a_row @ w.T, g_row @ w, g_column.T @ a_column]


def operands(tokens: int, inputs: int, outputs: int) -> list[Tensor]:
    """Values with outliers and zeros, whose blocks have very different scales."""
    generator = torch.Generator().manual_seed(tokens)
    x, weight, grad = (
        torch.randn(*s, generator=generator) for s in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    x *= torch.logspace(-3, 3, tokens)[:, None]
    x[0, 0], x[tokens // 2] = 3e4, 0.0
    grad *= 1e-6 * torch.logspace(-2, 2, outputs)
    return [x, weight, grad]


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(256, 128, 384), (40, 208, 144)])
def test_linear_equals_the_formula(recipe: Recipe, tokens: int, inputs: int, outputs: int) -> None:
    x, weight, grad = operands(tokens, inputs, outputs)
    layer = te.Linear(inputs, outputs, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    x.requires_grad_()
    with te.fp8_autocast(fp8_recipe=recipe):
        y = layer(x.view(-1, 2, inputs))
    y.backward(grad.view(-1, 2, outputs))  # outside, as Megatron's backward pass is
    for found, expected in zip(
        (y.flatten(0, 1), x.grad, layer.weight.grad), linear_by_hand(x, weight, grad, recipe), strict=True
    ):
        scale = np.abs(expected).max()
        torch.testing.assert_close(found.double() / scale, torch.from_numpy(expected) / scale, **SUMS)


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_rounding_is_what_changes(recipe: Recipe) -> None:
    """e4m3 keeps 4 bits: a relative error of up to 1/16 per operand, of about 2 % in a sum of many products."""
    torch.manual_seed(0)
    layer, x = te.Linear(256, 256, bias=False), torch.randn(128, 256)
    exact = layer(x)
    with te.fp8_autocast(fp8_recipe=recipe):
        rounded = layer(x)
    assert 0.01 < (rounded - exact).norm() / exact.norm() < 0.06


def test_layernorm_linear_rounds_the_output_of_the_norm() -> None:
    torch.manual_seed(0)
    layer = te.LayerNormLinear(64, 32, normalization="RMSNorm", bias=True)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(16, 1, 64)
    normed = torch.nn.functional.rms_norm(x, (64,), layer.layer_norm_weight, layer.eps)
    expected, _, _ = linear_by_hand(normed[:, 0], layer.weight, torch.zeros(16, 32), RECIPES[0])
    with te.fp8_autocast(fp8_recipe=RECIPES[0]):
        y = layer(x)
    torch.testing.assert_close(y[:, 0].double(), torch.from_numpy(expected) + layer.bias.double(), **SUMS)


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_experts_are_rounded_one_by_one(recipe: Recipe) -> None:
    splits, (x, _, grad) = [5, 0, 27], operands(32, 64, 48)
    layer = te.GroupedLinear(3, 64, 48, bias=False)
    pad, unpad = te.Fp8Padding(3), te.Fp8Unpadding(3)
    x.requires_grad_()
    with te.fp8_autocast(fp8_recipe=recipe):
        padded, padded_splits = pad(x, splits)
        y = unpad(layer(padded, padded_splits), splits)
    y.backward(grad)
    assert padded_splits == [16, 0, 32]
    assert not padded[5:16].any()
    for expert, (start, end) in enumerate([(0, 5), (5, 32)]):
        weight = layer.weight0 if expert == 0 else layer.weight2
        expected = linear_by_hand(x[start:end], weight, grad[start:end], recipe)
        for found, wanted in zip((y[start:end], x.grad[start:end], weight.grad), expected, strict=True):
            scale = np.abs(wanted).max()
            torch.testing.assert_close(found.double() / scale, torch.from_numpy(wanted) / scale, **SUMS)
    assert not layer.weight1.grad.any()


def test_non_finite_values() -> None:
    """As in the casting kernels: infinities saturate, NaN stays."""
    layer, x = te.Linear(16, 16, bias=False), torch.ones(8, 16)
    x[0, 0], x[1, 0] = float("inf"), float("nan")
    with te.fp8_autocast(fp8_recipe=RECIPES[0]):
        y = layer(x)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


def test_weights_are_rounded_again_in_the_first_micro_batch() -> None:
    layer, x = te.Linear(16, 16, bias=False), torch.randn(8, 16)
    with te.fp8_autocast(fp8_recipe=RECIPES[0]), torch.no_grad():
        before = layer(x, is_first_microbatch=True)
        layer.weight.mul_(2)
        assert torch.equal(layer(x, is_first_microbatch=False), before)
        assert torch.equal(layer(x, is_first_microbatch=True), 2 * before)
        layer.weight.mul_(2)
        assert torch.equal(layer(x), 4 * before)
        assert torch.equal(layer(x, is_first_microbatch=False), 2 * before)


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(4, 16, 16), (8, 24, 16), (8, 16, 12)])
def test_sizes_that_fp8_products_do_not_take(tokens: int, inputs: int, outputs: int) -> None:
    layer, x = te.Linear(inputs, outputs, bias=False), torch.randn(tokens, inputs)
    assert layer(x).shape == (tokens, outputs)
    with te.fp8_autocast(fp8_recipe=RECIPES[0]), pytest.raises(AssertionError, match="divisible"):
        layer(x)


def test_autocast_ends_and_nests() -> None:
    with te.fp8_autocast(fp8_recipe=RECIPES[0]):
        with te.fp8_autocast(enabled=False):
            assert not FP8GlobalStateManager.is_fp8_enabled()
        with pytest.raises(KeyError), te.fp8_autocast(fp8_recipe=RECIPES[1]):
            raise KeyError
        assert FP8GlobalStateManager.get_fp8_recipe() is RECIPES[0]
    assert not FP8GlobalStateManager.is_fp8_enabled()
    with pytest.raises(RuntimeError):
        FP8GlobalStateManager.get_fp8_recipe()


@pytest.mark.parametrize(
    "start",
    [
        DelayedScaling,
        lambda: te.fp8_autocast().__enter__(),
        lambda: te.fp8_autocast(calibrating=True, fp8_recipe=RECIPES[0]).__enter__(),
        lambda: Float8CurrentScaling(fp8_dpa=True),
        te.fp8_model_init,
    ],
)
def test_what_is_not_emulated_raises(start: Callable[[], Any]) -> None:
    with pytest.raises(NotImplementedError):
        start()


# --- Megatron -------------------------------------------------------------------------------------------------------


class Tracker:
    """States of random generators, as Megatron's tracker has them."""

    def __init__(self) -> None:
        self.states = {"model-parallel-rng": 1}

    def get_states(self) -> dict[str, int]:
        return self.states

    def set_states(self, states: dict[str, int]) -> None:
        self.states = states


def test_recompute_is_in_fp8() -> None:
    torch.manual_seed(0)
    layer, x, grad = te.Linear(16, 16, bias=False), torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
    enabled, gradients, tracker = [], [], Tracker()

    def forward(hidden: Tensor) -> Tensor:
        enabled.append(FP8GlobalStateManager.is_fp8_enabled())
        return layer(hidden).square()

    for run in (forward, lambda hidden: checkpoint(forward, hidden, get_rng_state_tracker=lambda: tracker)):
        with te.fp8_autocast(fp8_recipe=RECIPES[0]):
            y = run(x)
        gradients.append(torch.autograd.grad(y, (x, layer.weight), grad))
    assert enabled == [True] * 3
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("fp8", list(Fp8))
def test_a_gpu_without_fp8_is_rejected(monkeypatch: pytest.MonkeyPatch, fp8: Fp8) -> None:
    require_fp8({"distill.fp8": fp8, "distill.teacher_fp8": None})
    name = {Fp8.hybrid: "is_fp8_available", Fp8.blockwise: "is_fp8_block_scaling_available"}[fp8]
    monkeypatch.setattr(FP8GlobalStateManager, name, lambda: (False, "Compute capability 9.0 required."))
    require_fp8({"distill.fp8": None, "distill.teacher_fp8": None})
    for key, off in (("distill.fp8", "null"), ("distill.teacher_fp8", "false")):
        with pytest.raises(ConfigError, match=rf"Compute capability 9.0 required\); set {key}={off}"):
            require_fp8({key: fp8})


@pytest.mark.parametrize(("fp8", "recipe"), [(Fp8.hybrid, RECIPES[0]), (Fp8.blockwise, RECIPES[1])])
def test_settings_choose_the_recipe(fp8: Fp8, recipe: Recipe) -> None:
    made = config()
    match_precision(made, Precision.bf16, fp8)
    with get_fp8_context(made, layer_no=0):
        assert FP8GlobalStateManager.get_fp8_recipe() == recipe
    match_precision(made, Precision.bf16, None)
    with get_fp8_context(made, layer_no=0):
        assert not FP8GlobalStateManager.is_fp8_enabled()


def layers_in_fp8(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[list[bool], Tensor]:
    """Whether each product of a model's layers is in FP8, in order; and the logits."""
    seen: list[bool] = []
    forward = te.Linear.forward

    def record(self: Any, *args: Any, **options: Any) -> Any:
        seen.append(FP8GlobalStateManager.is_fp8_enabled())
        return forward(self, *args, **options)

    monkeypatch.setattr(te.Linear, "forward", record)
    ids = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    with one_rank(), torch.no_grad():
        core = core_model(**settings)
        logits = core(ids, positions(ids), None)
    monkeypatch.setattr(te.Linear, "forward", forward)
    return seen, logits


def test_megatron_turns_fp8_on_for_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
    off, exact = layers_in_fp8(monkeypatch)
    on, rounded = layers_in_fp8(monkeypatch, **fp8)
    ends, partly = layers_in_fp8(monkeypatch, **fp8, first_last_layers_bf16=True)
    assert (off, on) == ([False] * 16, [True] * 16)  # 4 layers of 4 products
    assert ends == [False] * 4 + [True] * 8 + [False] * 4
    errors = [(logits - exact).norm() for logits in (rounded, partly)]
    assert errors[0] > errors[1] > 0


@pytest.mark.parametrize("fp8", [("hybrid", "tensorwise"), ("e4m3", "blockwise")])
def test_megatron_pads_the_tokens_of_experts(monkeypatch: pytest.MonkeyPatch, fp8: tuple[str, str]) -> None:
    splits: list[list[int]] = []
    forward = te.GroupedLinear.forward

    def record(self: Any, x: Tensor, m_splits: list[int], *args: Any, **options: Any) -> Any:
        splits.append([int(rows) for rows in m_splits])
        return forward(self, x, m_splits, *args, **options)

    monkeypatch.setattr(te.GroupedLinear, "forward", record)
    experts = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32, "moe_grouped_gemm": True}
    on, rounded = layers_in_fp8(monkeypatch, **experts, fp8=fp8[0], fp8_recipe=fp8[1])
    assert on == [True] * 8  # attention's
    assert len(splits) == 8
    assert all(rows % 16 == 0 for layer in splits for rows in layer)
    splits.clear()
    _, exact = layers_in_fp8(monkeypatch, **experts)
    assert any(rows % 16 for layer in splits for rows in layer)
    # A router may choose another expert for a few tokens.
    assert 0 < (rounded - exact).norm() < 0.5 * exact.norm()
