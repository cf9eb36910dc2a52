"""Patches for the CUDA calls in NeMo, Megatron-Core and Model Optimizer, so that they run on a CPU.

Each patch names its target, the upstream line that needs it (megatron-core 0.15.3, nemo_toolkit 2.7.3,
nvidia-modelopt 0.40.0, torch 2.13.0) and when it can be removed. A target in a module that is not imported yet is
patched right after that module is imported, before other modules can bind the name.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch._C._distributed_c10d import FakeWork

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Patch:
    """A replaced name.

    Attributes:
        target: `module:attribute`, where the attribute may have dots.
        replacement: takes the original and returns its replacement.
        cause: the upstream file and line that cannot run without CUDA as it is.
        until: when the patch can be removed.
    """

    target: str
    replacement: Callable[[Any], Any]
    cause: str
    until: str

    @property
    def module(self) -> str:
        """The module that holds the target."""
        return self.target.partition(":")[0]

    def apply(self) -> None:
        """Replace the target in its module, which must be imported."""
        *path, name = self.target.partition(":")[2].split(".")
        owner = functools.reduce(getattr, path, sys.modules[self.module])
        setattr(owner, name, self.replacement(getattr(owner, name)))


def apply(patches: Sequence[Patch]) -> None:
    """Apply the patches of PyTorch now, the others when their modules are imported.

    Raises:
        RuntimeError: a module to patch has already been imported, so other modules may have bound the unpatched name.
    """
    late = {patch.module for patch in patches if not _is_torch(patch.module)} & sys.modules.keys()
    if late:
        raise RuntimeError(f"{', '.join(sorted(late))} was imported before the backend was activated")
    for patch in patches:
        if _is_torch(patch.module):
            importlib.import_module(patch.module)
            patch.apply()
    sys.meta_path.insert(0, _PatchOnImport([patch for patch in patches if not _is_torch(patch.module)]))


def _is_torch(module: str) -> bool:
    return module.partition(".")[0] == "torch"


class _PatchOnImport(importlib.abc.MetaPathFinder):
    """Finder that applies the patches of a module right after the module has run."""

    def __init__(self, patches: Sequence[Patch]) -> None:
        self._modules = {patch.module for patch in patches}
        self._patches = patches

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._modules:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run_module = spec.loader.exec_module

        def run_and_patch(module: ModuleType) -> None:
            run_module(module)
            for patch in self._patches:
                if patch.module == fullname:
                    patch.apply()

        spec.loader.exec_module = run_and_patch  # type: ignore[method-assign]
        return spec


def _calling(function: Callable[..., Any]) -> Callable[[Any], Callable[..., Any]]:
    """Return a replacement that calls `function` and ignores the original.

    Each target gets its own function: torch._dynamo rejects one function under two of its known names.
    """

    def replacement(original: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return call

    return replacement


def _nothing(*_: object, **__: object) -> None:
    return None


def _unchanged(thing: Any, *_: object, **__: object) -> Any:
    return thing


def _without_cuda_builds(load_inline: Callable[..., Any]) -> Callable[..., Any]:
    """Make `load_inline` raise OSError for CUDA builds, as it does without a CUDA compiler."""

    @functools.wraps(load_inline)
    def load(name: str, *args: Any, with_cuda: bool | None = None, **kwargs: Any) -> Any:
        if with_cuda:
            raise OSError(f"{name} is not built: no CUDA device is visible")
        return load_inline(name, *args, with_cuda=with_cuda, **kwargs)

    return load


def _is_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Make a tensor factory map "cuda" to the CPU, and ignore pinned memory."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            kwargs.pop("pin_memory", None)
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


def _to_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    """Make `Tensor.to` map "cuda" to the CPU."""

    @functools.wraps(to)
    def move(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        elif kwargs and _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return to(tensor, *args, **kwargs)

    return move


def _type_with_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """Make `Tensor.type()` return the CUDA name of a CPU tensor's type."""

    @functools.wraps(original)
    def type_of(tensor: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(tensor, dtype, *args, **kwargs)
        name = original(tensor)
        return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)

    return type_of


def _gather_scalars(gather: Callable[..., Any]) -> Callable[..., Any]:
    """Make `all_gather_into_tensor` accept 0-d inputs on gloo, as NCCL does."""

    @functools.wraps(gather)
    def gather_into(output: torch.Tensor, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return gather(output, tensor.reshape(1) if tensor.dim() == 0 else tensor, *args, **kwargs)

    return gather_into


def _skip_in_single_rank(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Make a collective from one tensor into another skip gloo in single-rank groups.

    Gloo copies in its own thread. With that thread's pool, OpenMP counts more threads than cores, and the threads of
    every pool then sleep between operators.
    """

    @functools.wraps(collective)
    def run(output: torch.Tensor, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.distributed.get_world_size(kwargs.get("group")) > 1:
            return collective(output, tensor, *args, **kwargs)
        if output.data_ptr() != tensor.data_ptr():
            output.copy_(tensor)
        return FakeWork() if kwargs.get("async_op") else None

    return run


class _Stream:
    """A CUDA stream on a CPU, where everything runs in order."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def record_event(self, event: object = None) -> _Stream:
        """Return the stream as the event, because all work is already complete."""
        return self

    def synchronize(self) -> None:
        """Nothing to wait for."""


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _rng_state(*_: object, **__: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: object, **__: object) -> None:
    torch.set_rng_state(state)


def _fork(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace `CudaRNGStatesTracker.fork` on the CPU generator, without the check that the generator is unused."""

    @contextmanager
    def fork(tracker: Any, name: str = "model-parallel-rng") -> Iterator[None]:
        if name not in tracker.states_:
            raise RuntimeError(f"rng state {name} is not added; seed with model_parallel_cuda_manual_seed first")
        outside = torch.get_rng_state()
        torch.set_rng_state(tracker.states_[name])
        try:
            yield
        finally:
            tracker.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)

    return fork


def _seed_tracker_too(set_random_seed: Callable[[int], None]) -> Callable[[int], None]:
    """Make NeMo's `_set_random_seed` seed Megatron's tracker, which it skips without CUDA devices."""

    @functools.wraps(set_random_seed)
    def seed_all(seed: int) -> None:
        from megatron.core import parallel_state, tensor_parallel  # only after the patches are applied

        set_random_seed(seed)
        # The seed of the upstream call.
        tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())

    return seed_all


def _to_numpy(tensor: Any, as_numpy: bool = False, **_: object) -> Any:
    """Replace `maybe_move_tensor_to_cpu` for CPU tensors: token counts in the form that c10d accepts."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _swiglu_back(grad: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    gate, linear = y.chunk(2, -1)
    out = torch.empty_like(y)
    grad_gate, grad_linear = out.chunk(2, -1)
    torch.mul(grad, torch.nn.functional.silu(gate), out=grad_linear)
    torch.ops.aten.silu_backward.grad_input(grad * linear, gate, grad_input=grad_gate)
    return out


_NO_CUDA = "upstream does not call CUDA there"
_FACTORIES = {
    "tensor": "nemo/lightning/pytorch/strategies/megatron_strategy.py:801, megatron/core/optimizer/optimizer.py:481",
    "zeros": "megatron/core/pipeline_parallel/schedules.py:573, megatron/core/optimizer/clip_grads.py:103",
    "ones": "megatron/core/transformer/utils.py:35",
    "empty": "megatron/core/dist_checkpointing/exchange_utils.py:329",
    "empty_like": "megatron/core/dist_checkpointing/exchange_utils.py:107",
}

PATCHES: tuple[Patch, ...] = (
    Patch(
        "torch.utils.cpp_extension:load_inline",
        _without_cuda_builds,
        "megatron/core/inference/unified_memory.py:72 builds for CUDA when it is imported; with a CUDA build of torch"
        " and no visible GPU that raises IndexError (torch/utils/cpp_extension.py:2714), which line 82 does not handle",
        "Megatron builds it on first use",
    ),
    Patch(
        "torch.cuda:current_device",
        _calling(lambda: _CPU),
        "megatron/core/distributed/param_and_grad_buffer.py:702 and over 100 more places allocate on it",
        _NO_CUDA,
    ),
    Patch(
        "torch.cuda:synchronize",
        _calling(_nothing),
        "megatron/core/pipeline_parallel/p2p_communication.py:398",
        _NO_CUDA,
    ),
    Patch("torch.cuda:Stream", lambda original: _Stream, "nemo/lightning/megatron_parallel.py:617", _NO_CUDA),
    Patch(
        "torch.cuda:stream",
        _calling(lambda stream: nullcontext()),
        "nemo/lightning/megatron_parallel.py:617",
        _NO_CUDA,
    ),
    Patch(
        "torch.cuda:current_stream",
        _calling(lambda *_: _Stream()),
        "megatron/core/transformer/moe/token_dispatcher.py:831",
        _NO_CUDA,
    ),
    Patch("torch.cuda:manual_seed", _calling(_seed), "megatron/core/tensor_parallel/random.py:198, :370", _NO_CUDA),
    Patch("torch.cuda:get_rng_state", _calling(_rng_state), "megatron/core/tensor_parallel/random.py:196", _NO_CUDA),
    Patch("torch.cuda:set_rng_state", _calling(_set_rng_state), "megatron/core/rerun_state_machine.py:915", _NO_CUDA),
    Patch("torch:Tensor.cuda", _calling(_unchanged), "modelopt/torch/nas/plugins/megatron.py:1621", _NO_CUDA),
    Patch("torch.nn:Module.cuda", _calling(_unchanged), "nemo/lightning/megatron_parallel.py:577", _NO_CUDA),
    Patch("torch:Tensor.to", _to_cpu, "nemo/lightning/pytorch/strategies/megatron_strategy.py:801", _NO_CUDA),
    *(Patch(f"torch:{name}", _on_cpu, cause, _NO_CUDA) for name, cause in _FACTORIES.items()),
    Patch(
        "torch:Tensor.type",
        _type_with_cuda,
        "megatron/core/optimizer/clip_grads.py:167, optimizer.py:686, distrib_optimizer.py:416 compare type names",
        "Megatron compares dtypes instead",
    ),
    Patch(
        "torch.distributed:all_gather_into_tensor",
        _gather_scalars,
        "modelopt/torch/nas/plugins/megatron.py:1623 gathers 0-d tensors, which gloo rejects",
        "gloo gathers 0-d tensors",
    ),
    *(
        Patch(
            f"torch.distributed:{name}",
            _skip_in_single_rank,
            "megatron/core/distributed/param_and_grad_buffer.py:248, :395: in place on NCCL, copies on gloo",
            "gloo works in place in single-rank groups",
        )
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor")
    ),
    Patch(
        "megatron.core.jit:jit_fuser",
        _calling(_unchanged),
        "megatron/core/jit.py:12: torch.compile needs a C++ compiler and took 36 s for the first function of a process",
        "torch.compile keeps its CPU kernels across processes at no cost",
    ),
    Patch(
        "megatron.core.fusions.fused_bias_swiglu:swiglu_back",
        _calling(_swiglu_back),
        "megatron/core/fusions/fused_bias_swiglu.py:56: twelve passes over the activations without fusion",
        "torch.compile fuses them, as above",
    ),
    Patch(
        "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
        _calling(_rng_state),
        "megatron/core/tensor_parallel/random.py:383 (activation recompute)",
        _NO_CUDA,
    ),
    Patch(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        _calling(_set_rng_state),
        "megatron/core/tensor_parallel/random.py:391 (activation recompute)",
        _NO_CUDA,
    ),
    Patch(
        "megatron.core.tensor_parallel.random:CudaRNGStatesTracker.fork",
        _fork,
        "megatron/core/tensor_parallel/random.py:221 warns whenever the CPU's generator is used inside",
        _NO_CUDA,
    ),
    Patch(
        "megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu",
        _calling(_to_numpy),
        "megatron/core/transformer/moe/moe_utils.py:883 converts CUDA tensors only; all_to_all needs numbers",
        "Megatron converts tensors on any device",
    ),
    *(
        Patch(
            f"megatron.core.{module}:is_te_min_version",
            _calling(lambda *_, **__: True),
            f"megatron/core/{line} accepts FP8 from a later Transformer Engine than the stand-in says it is",
            "the stand-in follows Transformer Engine 2",
        )
        for module, line in (
            ("fp8_utils", "fp8_utils.py:450"),
            ("transformer.transformer_config", "transformer/transformer_config.py:1320"),
        )
    ),
    Patch(
        "nemo.lightning.megatron_init:_set_random_seed",
        _seed_tracker_too,
        "nemo/lightning/megatron_init.py:238 seeds the tracker only if torch.cuda.device_count() > 0",
        "NeMo seeds the tracker on any device",
    ),
    Patch(
        "nemo.lightning.io.pl:_fix_tensors_device",
        _calling(_unchanged),
        "nemo/lightning/io/pl.py:495 asserts that CUDA is initialized",
        "NeMo asserts it for CUDA tensors only",
    ),
)
