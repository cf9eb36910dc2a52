"""The stand-in's norms, compared with PyTorch and transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

if torch.cuda.is_available():
    pytest.skip("the stand-in is for machines without CUDA", allow_module_level=True)

from prune_distill.nemo import backend

backend.activate()

from transformer_engine.pytorch import LayerNorm, RMSNorm  # noqa: E402

# fp32 against fp64 over 96 terms: some 2^-23 of values up to 10.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


def _reference(name: str, x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor | None) -> torch.Tensor:
    if name == "RMSNorm":
        return F.rms_norm(x, gamma.shape, gamma, 1e-5)
    return F.layer_norm(x, gamma.shape, gamma, beta, 1e-5)


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm], ids=["RMSNorm", "LayerNorm"])
def test_output_and_gradients_equal_pytorch_in_fp64(kind: type, zero_centered: bool) -> None:
    torch.manual_seed(0)
    norm = kind(96, eps=1e-5, zero_centered_gamma=zero_centered)
    for parameter in norm.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 1.5)
    x, grad = torch.randn(5, 3, 96, requires_grad=True), torch.randn(5, 3, 96)
    y = norm(x)
    y.backward(grad)

    wide = [t.detach().double().requires_grad_() for t in (x, *norm.parameters())]
    gamma = wide[1] + 1 if zero_centered else wide[1]
    expected = _reference(kind.__name__, wide[0], gamma, wide[2] if len(wide) == 3 else None)
    expected.backward(grad.double())
    torch.testing.assert_close(y, expected.float(), **ROUNDING)
    for ours, theirs in zip((x, *norm.parameters()), wide, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad.float(), **ROUNDING)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm], ids=["RMSNorm", "LayerNorm"])
def test_bf16_is_computed_in_fp32_and_cast_back_once(kind: type) -> None:
    torch.manual_seed(0)
    norm = kind(96, params_dtype=torch.bfloat16)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = (torch.randn(64, 96) * 30).bfloat16().requires_grad_()
    y = norm(x)
    y.sum().backward()
    beta = None if kind is RMSNorm else norm.bias.float()
    exact = _reference(
        kind.__name__, x.detach().double(), norm.weight.double(), None if beta is None else beta.double()
    )
    # Only one rounding to bf16 (8 bits) is allowed; fp32 before it can change a tie.
    torch.testing.assert_close(y.double(), exact, rtol=2**-8 * 1.01, atol=0)
    assert (y.dtype, x.grad.dtype, norm.weight.grad.dtype) == (torch.bfloat16,) * 3


def test_rms_norm_equals_transformers() -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    theirs, ours = Qwen3RMSNorm(64, eps=1e-6), RMSNorm(64, eps=1e-6)
    torch.nn.init.uniform_(theirs.weight, 0.5, 1.5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(7, 2, 4, 64)
    torch.testing.assert_close(ours(x), theirs(x), **ROUNDING)


def test_parameters_are_marked_and_named_as_in_checkpoints() -> None:
    assert list(RMSNorm(8).state_dict()) == ["weight"]
    assert list(LayerNorm(8).state_dict()) == ["weight", "bias"]
    norm = LayerNorm(8, sequence_parallel=True, zero_centered_gamma=True)
    assert norm.weight.sequence_parallel
    assert norm.bias.sequence_parallel
    assert norm.weight.tolist() == [0.0] * 8


def test_parameters_may_be_on_meta_but_not_on_a_gpu() -> None:
    assert RMSNorm(8, device="meta").weight.is_meta
    with pytest.raises(NotImplementedError, match="device 'cuda'.*use_cpu_initialization"):
        RMSNorm(8, device="cuda")
