"""Patches of CUDA functions on a CPU, applied before other modules bind the originals."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the patches are for machines without CUDA", allow_module_level=True)

from prune_distill.nemo import backend
from prune_distill.nemo.cpu import patches

backend.activate()

SITE_PACKAGES = Path(torch.__file__).parents[1]


@pytest.mark.parametrize("patch", patches.PATCHES, ids=lambda patch: patch.target)
def test_every_patch_names_an_upstream_line(patch: patches.Patch) -> None:
    file, line = re.findall(r"([\w/]+\.py):(\d+)", patch.cause)[0]
    assert len((SITE_PACKAGES / file).read_text().splitlines()) >= int(line)
    assert patch.until


def test_cuda_is_mapped_to_cpu_for_tensors_and_modules() -> None:
    assert torch.cuda.current_device() == torch.device("cpu")
    made = [
        torch.tensor([1.0], device="cuda"),
        torch.tensor(3, pin_memory=True).to("cuda", non_blocking=True),
        torch.zeros(2, device=torch.device("cuda", 0)),
        torch.ones(2, 2, dtype=torch.bool, device="cuda"),
        torch.empty(0, device=torch.cuda.current_device()),
        torch.empty_like(torch.ones(2), device="cuda"),
        torch.ones(1).to(device="cuda"),
        torch.ones(1).cuda(),
        torch.nn.Linear(1, 1).cuda().weight,
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert torch.ones(1).to(torch.float64).dtype is torch.float64
    assert torch.empty(2, device="meta").is_meta


def test_type_names_are_cudas_as_megatron_compares_them() -> None:
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type(torch.int32).dtype is torch.int32


def test_streams_and_synchronization_do_nothing() -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(stream)
    with torch.cuda.stream(stream):
        torch.cuda.synchronize()


def test_jit_fuser_does_not_change_functions() -> None:
    from megatron.core.fusions.fused_bias_swiglu import swiglu
    from megatron.core.jit import jit_fuser

    assert jit_fuser(patches.apply) is patches.apply
    assert swiglu.__module__ == "megatron.core.fusions.fused_bias_swiglu"


def test_the_swiglu_gradient_matches_its_formula() -> None:
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    torch.manual_seed(0)
    y, grad = torch.randn(6, 10, requires_grad=True), torch.randn(6, 5)
    gate, linear = y.chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * linear
    found = bias_swiglu_impl(y, None)
    assert torch.equal(found, expected)
    (of_found,), (of_expected,) = (torch.autograd.grad(of, y, grad) for of in (found, expected))
    torch.testing.assert_close(of_found, of_expected)


def test_single_rank_groups_do_not_communicate(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        whole = torch.arange(4.0)
        assert torch.distributed.reduce_scatter_tensor(whole, whole) is None
        assert whole.tolist() == [0, 1, 2, 3]
        gathered = torch.zeros(4)
        torch.distributed.all_gather_into_tensor(gathered, whole, async_op=True).wait()
        assert torch.equal(gathered, whole)
    finally:
        torch.distributed.destroy_process_group()


def test_dynamo_can_be_imported_over_the_patches() -> None:
    """It fails to start if one function has two of its known names."""
    from torch._dynamo.trace_rules import get_torch_obj_rule_map

    assert torch.zeros in get_torch_obj_rule_map()


def test_each_named_random_state_is_a_stream_of_its_own() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("a", 1)
    tracker.add("b", 2)
    torch.manual_seed(0)
    plain = torch.rand(6)
    torch.manual_seed(0)
    outside, inside = [torch.rand(3)], []
    for name in ("a", "b", "a"):
        with tracker.fork(name):
            inside.append(torch.rand(3))
    outside.append(torch.rand(3))
    expected = torch.Generator().manual_seed(1)
    assert torch.equal(torch.cat(outside), plain)  # no effect outside
    assert torch.equal(torch.cat((inside[0], inside[2])), torch.rand(6, generator=expected))  # "a" continues
    assert not torch.equal(inside[0], inside[1])


def test_an_unknown_random_state_is_an_error() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    with pytest.raises(RuntimeError, match="model-parallel-rng is not added"), CudaRNGStatesTracker().fork():
        pass


def test_recompute_uses_the_same_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel import random

    monkeypatch.setattr(random, "_CUDA_RNG_STATE_TRACKER", random.CudaRNGStatesTracker())
    monkeypatch.setattr(random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True)
    x = torch.ones(64, requires_grad=True)
    y = random.checkpoint(lambda t: torch.nn.functional.dropout(t, 0.5), False, x)
    torch.rand(5)  # between forward and backward
    y.sum().backward()
    assert torch.equal(y.detach(), x.grad)


# --- how patches are applied ----------------------------------------------------------------------------------------


@pytest.fixture
def late_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "imported_late.py").write_text("class Thing:\n    size = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "imported_late"
    sys.modules.pop("imported_late", None)


def _doubled(original: Any) -> Any:
    return original * 2


def test_a_module_is_patched_when_it_is_imported(late_module: str) -> None:
    patches.apply([patches.Patch(f"{late_module}:Thing.size", _doubled, "cause", "until")])
    assert late_module not in sys.modules
    module: ModuleType = importlib.import_module(late_module)
    assert module.Thing.size == 2


def test_a_module_imported_before_is_an_error(late_module: str) -> None:
    module = importlib.import_module(late_module)
    with pytest.raises(RuntimeError, match="imported_late was imported before"):
        patches.apply([patches.Patch(f"{late_module}:Thing.size", _doubled, "cause", "until")])
    assert module.Thing.size == 1


def test_a_target_that_upstream_dropped_is_an_error(late_module: str) -> None:
    patches.apply([patches.Patch(f"{late_module}:Thing.gone", _doubled, "cause", "until")])
    with pytest.raises(AttributeError, match="gone"):
        importlib.import_module(late_module)
