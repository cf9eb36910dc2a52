"""The stand-in's GroupedLinear; for MoE models see tests/integration/test_conversion.py."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

if torch.cuda.is_available():
    pytest.skip("the stand-in is for machines without CUDA", allow_module_level=True)

from prune_distill.nemo import backend

backend.activate()

from transformer_engine.pytorch import GroupedLinear  # noqa: E402

# fp32 sums over 48 terms against fp64.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("parallel_mode", ["column", "row", None])
@pytest.mark.parametrize("splits", [[3, 4, 2], [9, 0, 0], [0, 9, 0], [0, 0, 0]])
def test_every_expert_processes_its_tokens(splits: list[int], parallel_mode: str | None) -> None:
    torch.manual_seed(0)
    layer = GroupedLinear(3, 48, 32, bias=False, parallel_mode=parallel_mode)
    x = torch.randn(sum(splits), 48, requires_grad=True)
    y = layer(x, splits, is_first_microbatch=True)
    grad = torch.randn(sum(splits), 32)
    y.backward(grad)
    wide_x = x.detach().double().requires_grad_()
    weights = [getattr(layer, f"weight{expert}").detach().double().requires_grad_() for expert in range(3)]
    owners = [expert for expert, share in enumerate(splits) for _ in range(share)]
    expected = [F.linear(wide_x[token], weights[expert]) for token, expert in enumerate(owners)]
    assert y.shape == (len(owners), 32)
    if not owners:
        return
    torch.stack(expected).backward(grad.double())
    torch.testing.assert_close(y, torch.stack(expected).float(), **ROUNDING)
    torch.testing.assert_close(x.grad, wide_x.grad.float(), **ROUNDING)
    for expert, weight in enumerate(weights):
        ours = getattr(layer, f"weight{expert}").grad
        theirs = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(ours, theirs.float(), **ROUNDING)  # an expert without tokens has zeros, not None


def test_splits_must_cover_the_tokens() -> None:
    with pytest.raises(RuntimeError, match="split"):
        GroupedLinear(2, 4, 3, bias=False)(torch.zeros(5, 4), [2, 2])


def test_its_parameters_are_named_and_marked_as_megatron_expects() -> None:
    for mode, dimension in (("column", 0), ("row", 1)):
        layer = GroupedLinear(2, 4, 3, bias=False, parallel_mode=mode, params_dtype=torch.bfloat16)
        assert {name: (weight.shape, weight.dtype) for name, weight in layer.named_parameters()} == {
            f"weight{expert}": (torch.Size((3, 4)), torch.bfloat16) for expert in range(2)
        }
        assert all(weight.partition_dim == dimension for weight in layer.parameters())
    assert layer.state_dict()["_extra_state"] is None


def test_weights_are_initialized_with_the_named_rng_state() -> None:
    entered = []

    class Tracker:
        @contextmanager
        def fork(self, name: str = "default"):  # type: ignore[no-untyped-def]
            entered.append(name)
            yield

    options = {"get_rng_state_tracker": Tracker, "rng_tracker_name": "expert-parallel-rng"}
    layer = GroupedLinear(2, 4, 3, bias=False, init_method=torch.nn.init.ones_, **options)
    assert [weight.sum() for weight in layer.parameters()] == [12, 12]
    assert entered == ["expert-parallel-rng"] * 2


def test_meta_weights_are_not_initialized() -> None:
    layer = GroupedLinear(2, 4, 3, bias=False, device="meta", init_method=lambda weight: pytest.fail("drawn"))
    assert all(weight.is_meta for weight in layer.parameters())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bias": True}, "add_bias_linear=False"),
        ({"return_bias": True}, "add_bias_linear=False"),
        ({"fuse_wgrad_accumulation": True}, "grouped linear layer with biases or fused gradients"),
        ({"tp_size": 2}, "expert_tensor_parallel_size=1"),
        ({"ub_overlap_ag": True}, "ub_overlap_ag=True"),
        ({"device": "cuda:0"}, "use_cpu_initialization"),
    ],
)
def test_unsupported_options_raise(options: dict[str, object], named: str) -> None:
    with pytest.raises(NotImplementedError, match=named):
        GroupedLinear(2, 4, 4, **{"bias": False, **options})
