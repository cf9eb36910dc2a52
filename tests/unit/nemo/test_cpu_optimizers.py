"""The stand-in's FusedAdam, compared with PyTorch's optimizers, and the multi-tensor functions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the stand-in is for machines without CUDA", allow_module_level=True)

from prune_distill.nemo import backend

backend.activate()

from transformer_engine.pytorch import optimizers  # noqa: E402

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
# PyTorch's fused kernel and its plain loop order the same fp32 operations differently: a few units in the last place.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


def _parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((33, 7), (5,), (64, 16))]


def _run(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize(
    ("adam_w_mode", "reference"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)], ids=["AdamW", "Adam"]
)
def test_five_steps_equal_pytorch(adam_w_mode: bool, reference: Callable[..., torch.optim.Optimizer]) -> None:
    ours, theirs = _parameters(), _parameters()
    optimizer = optimizers.FusedAdam(ours, adam_w_mode=adam_w_mode, **SETTINGS)
    expected = reference(theirs, foreach=False, fused=False, **SETTINGS)
    _run(optimizer, ours, 0, 5)
    _run(expected, theirs, 0, 5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **ROUNDING)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[a][name], expected.state[b][name], **ROUNDING)


def test_state_is_laid_out_as_megatron_saves_it() -> None:
    params = _parameters()
    optimizer = optimizers.FusedAdam([{"params": params}, {"params": []}], **SETTINGS)
    _run(optimizer, params, 0, 3)
    assert optimizer.param_groups[0]["step"] == 3
    assert "step" not in optimizer.param_groups[1]  # as Transformer Engine does, see distrib_optimizer.py:676
    for param in params:
        state = optimizer.state[param]
        assert {name: (value.dtype, value.shape) for name, value in state.items()} == {
            "exp_avg": (torch.float32, param.shape),
            "exp_avg_sq": (torch.float32, param.shape),
        }


def test_a_loaded_state_continues_exactly() -> None:
    params = _parameters()
    optimizer = optimizers.FusedAdam(params, **SETTINGS)
    _run(optimizer, params, 0, 2)
    state = copy.deepcopy(optimizer.state_dict())
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    restored = optimizers.FusedAdam(others, lr=123.0)
    restored.load_state_dict(state)
    _run(optimizer, params, 2, 4)
    _run(restored, others, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_parameters_without_gradient_do_not_change() -> None:
    params = _parameters()
    before = params[1].detach().clone()
    optimizer = optimizers.FusedAdam(params, **SETTINGS)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state


def test_the_closures_loss_is_returned() -> None:
    (param, *_) = _parameters()
    optimizer = optimizers.FusedAdam([param], lr=0.0)

    def closure() -> torch.Tensor:
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == param.square().sum()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"amsgrad": True}, "amsgrad=True"),
        ({"capturable": True}, "capturable=True"),
        ({"master_weights": True}, "master_weights=True"),
        ({"exp_avg_dtype": torch.bfloat16}, "exp_avg_dtype"),
        ({"bias_correction": False}, "bias correction"),
    ],
)
def test_unsupported_options_raise(options: dict[str, Any], named: str) -> None:
    with pytest.raises(NotImplementedError, match=named):
        optimizers.FusedAdam(_parameters(), **options)


def test_other_unsupported_options_raise() -> None:
    half = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    half.grad = torch.ones_like(half)
    with pytest.raises(NotImplementedError, match="bfloat16 parameters"):
        optimizers.FusedAdam([half]).step()
    with pytest.raises(NotImplementedError, match="gradient scaler"):
        optimizers.FusedAdam(_parameters()).step(grad_scaler=object())
    with pytest.raises(NotImplementedError, match="optimizer='adam'"):
        optimizers.FusedSGD(_parameters(), lr=1.0)


def test_l2_norm_of_many_tensors() -> None:
    tensors = [param.detach() for param in _parameters()]
    flag = torch.zeros(1, dtype=torch.int)
    total, each = optimizers.multi_tensor_applier(optimizers.multi_tensor_l2norm, flag, [tensors], True)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.testing.assert_close(total, flat.double().norm().float().reshape(1), **ROUNDING)
    torch.testing.assert_close(each, torch.stack([tensor.norm() for tensor in tensors]), **ROUNDING)
    assert optimizers.multi_tensor_l2norm(1, flag, [tensors], False)[1] is None


@pytest.mark.parametrize("in_place", [True, False])
def test_scaling_many_tensors(in_place: bool) -> None:
    source = [param.detach() for param in _parameters()]
    expected = [tensor * 0.5 for tensor in source]
    target = source if in_place else [torch.empty_like(tensor) for tensor in source]
    flag = torch.zeros(1, dtype=torch.int)
    optimizers.multi_tensor_applier(optimizers.multi_tensor_scale, flag, [source, target], 0.5)
    assert all(torch.equal(a, b) for a, b in zip(target, expected, strict=True))
