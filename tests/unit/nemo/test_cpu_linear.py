"""The stand-in's Linear and LayerNormLinear on one rank; sharded: tests/integration/test_te_standin_parallel.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

if torch.cuda.is_available():
    pytest.skip("the stand-in is for machines without CUDA", allow_module_level=True)

from prune_distill.nemo import backend

backend.activate()

from transformer_engine.pytorch import LayerNormLinear, Linear  # noqa: E402

# fp32 sums over 48 terms against fp64.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("parallel_mode", ["column", "row", None])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_equals_pytorch(parallel_mode: str | None, bias: bool) -> None:
    torch.manual_seed(0)
    layer = Linear(48, 32, bias=bias, parallel_mode=parallel_mode)
    if bias:
        torch.nn.init.normal_(layer.bias)
    x, grad = torch.randn(5, 2, 48, requires_grad=True), torch.randn(5, 2, 32)
    y = layer(x, is_first_microbatch=True)
    y.backward(grad)
    wide = [t.detach().double().requires_grad_() for t in (x, *layer.parameters())]
    expected = F.linear(*wide)
    expected.backward(grad.double())
    torch.testing.assert_close(y, expected.float(), **ROUNDING)
    for ours, theirs in zip((x, *layer.parameters()), wide, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad.float(), **ROUNDING)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_layernorm_linear_is_norm_then_linear(normalization: str) -> None:
    torch.manual_seed(0)
    layer = LayerNormLinear(48, 32, eps=1e-6, normalization=normalization, bias=False)
    torch.nn.init.uniform_(layer.layer_norm_weight, 0.5, 1.5)
    x, grad = torch.randn(5, 2, 48, requires_grad=True), torch.randn(5, 2, 32)
    y = layer(x)
    y.backward(grad)
    wide_x = x.detach().double().requires_grad_()
    gamma, weight = layer.layer_norm_weight.double(), layer.weight.double()
    if normalization == "RMSNorm":
        normed = F.rms_norm(wide_x, (48,), gamma, 1e-6)
    else:
        normed = F.layer_norm(wide_x, (48,), gamma, layer.layer_norm_bias.double(), 1e-6)
    expected = F.linear(normed, weight)
    expected.backward(grad.double())
    torch.testing.assert_close(y, expected.float(), **ROUNDING)
    torch.testing.assert_close(x.grad, wide_x.grad.float(), **ROUNDING)


def test_a_returned_bias_is_not_added() -> None:
    layer = Linear(4, 3, bias=True, return_bias=True)
    torch.nn.init.ones_(layer.bias)
    y, bias = layer(torch.zeros(2, 1, 4))
    assert bias is layer.bias
    assert not y.any()


def test_state_has_an_empty_extra_state_and_no_bias_without_one() -> None:
    state = LayerNormLinear(4, 3, bias=False, normalization="RMSNorm").state_dict()
    assert set(state) == {"weight", "layer_norm_weight", "_extra_state"}
    assert state["_extra_state"] is None
    other = LayerNormLinear(4, 3, bias=False, normalization="RMSNorm")
    other.load_state_dict({**state, "_extra_state": torch.zeros(3, dtype=torch.uint8)})  # as written on a GPU
    assert torch.equal(other.weight, state["weight"])


def test_the_weight_is_initialized_with_the_named_rng_state() -> None:
    from contextlib import contextmanager

    entered = []

    class Tracker:
        @contextmanager
        def fork(self, name: str = "default"):  # type: ignore[no-untyped-def]
            entered.append(name)
            yield

    for name in (None, "data-parallel-rng"):
        layer = Linear(
            4, 3, init_method=torch.nn.init.ones_, get_rng_state_tracker=Tracker, rng_tracker_name=name, bias=False
        )
        assert layer.weight.sum() == 12
    assert entered == ["default", "data-parallel-rng"]


def test_a_meta_weight_is_not_initialized() -> None:
    layer = Linear(4, 3, device="meta", init_method=lambda weight: pytest.fail("drawn"))
    assert layer.weight.is_meta


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"fuse_wgrad_accumulation": True}, "gradient_accumulation_fusion=False"),
        ({"ub_overlap_ag": True}, "ub_overlap_ag=True"),
        ({"parameters_split": ("a", "b")}, "parameters_split"),
        ({"device": "cuda:0"}, "use_cpu_initialization"),
    ],
)
def test_unsupported_options_raise(options: dict[str, object], named: str) -> None:
    with pytest.raises(NotImplementedError, match=named):
        Linear(4, 4, **options)


def test_other_unsupported_options_raise() -> None:
    with pytest.raises(NotImplementedError, match="return_layernorm_output"):
        LayerNormLinear(4, 4, return_layernorm_output=True)
    with pytest.raises(ValueError, match="'diagonal'"):
        Linear(4, 4, parallel_mode="diagonal")
    with pytest.raises(ValueError, match="'BatchNorm'"):
        LayerNormLinear(4, 4, normalization="BatchNorm")
    with pytest.raises(ValueError, match="5 features.*2 tensor-parallel ranks"):
        Linear(4, 5, parallel_mode="column", tp_size=2)
