"""`recipes.distill` with measurements of the existing tensors, written to `memory-RANK.json` in its folder.

Not the process's resident memory, which is mostly libraries and what the allocator keeps. Between steps it is the
storages that Python objects hold, each once. Within a step it is what torch's profiler records of the allocator:
every allocation and every release, so that the sum's maximum is the peak, temporaries and tensors that only autograd
holds included. Releases by gloo's own threads escape it: where ranks exchange activations the sum is too high.
"""

from __future__ import annotations

import gc
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prune_distill.pipeline.stage import Stage
from prune_distill.pipeline.stage_main import rank
from prune_distill.schema import RunConfig
from recipes.__main__ import load_stage, main


def load(stage: Stage) -> Any:
    """`recipes.distill` with one more callback."""
    module: Any = load_stage(stage)
    from prune_distill.training import training

    def run(cfg: RunConfig, inputs: Any, out: Path) -> dict[str, Any]:
        make_trainer, probe = training._trainer, _probe(out / f"memory-{rank()}.json")
        training._trainer = lambda cfg, callbacks: make_trainer(cfg, [*callbacks, probe])
        return module.run(cfg, inputs, out)

    return SimpleNamespace(Inputs=module.Inputs, run=run)


def _probe(target: Path) -> Any:
    import torch
    from lightning.pytorch.callbacks import Callback

    from prune_distill.nemo.nemo_api import core_model

    class Probe(Callback):
        """Measures the parts after step 1, when the optimizer state exists, and their peak and `saved` in step 2."""

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 1:
                self.found: dict[str, Any] = _parts(trainer, pl_module)
                self.saved: dict[int, int] = {}
                self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
                self.hooks.__enter__()
                self.profiler = torch.profiler.profile(
                    activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
                )
                self.profiler.start()
            elif trainer.global_step == 2:
                self.profiler.stop()
                self.hooks.__exit__(None, None, None)
                parameters = {
                    parameter.untyped_storage().data_ptr() for parameter in core_model(pl_module).parameters()
                }
                self.found["saved"] = sum(size for place, size in self.saved.items() if place not in parameters)
                target.write_text(json.dumps({**self.found, **_peak(self.profiler, _exchanged(self.found))}))

        def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
            """Count the bytes that autograd saves: with one micro batch per step each tensor is counted once."""
            storage = tensor.untyped_storage()
            self.saved[storage.data_ptr()] = storage.nbytes()
            return tensor

    return Probe()


def _parts(trainer: Any, pl_module: Any) -> dict[str, int]:
    """Return bytes of persistent tensors by kind; `other`: the rest that Python can reach."""
    import torch

    from prune_distill.nemo.nemo_api import core_model

    core = core_model(pl_module)
    teacher = core.teacher_model.parameters() if hasattr(core, "teacher_model") else []
    (optimizer,) = trainer.optimizers
    adam = optimizer.mcore_optimizer
    seen: set[int] = set()
    gc.collect()
    student = [p for name, p in core.named_parameters() if not name.startswith("_teacher_model.")]
    buffers = [buffer.grad_data for chunk in trainer.strategy.megatron_parallel for buffer in _grad_buffers(chunk)]
    state = [value for part in _chain(adam) for values in part.state.values() for value in values.values()]
    masters = [p for part in _chain(adam) for group in part.param_groups for p in group["params"]]
    return {
        "weights": _bytes(student, seen),
        "teacher": _bytes(teacher, seen),
        "gradients": _bytes(buffers, seen),
        "optimizer": _bytes([*masters, *state], seen),
        "other": _bytes([found for found in gc.get_objects() if isinstance(found, torch.Tensor)], seen),
    }


def _grad_buffers(chunk: Any) -> Iterable[Any]:
    while not hasattr(chunk, "buffers") or not isinstance(chunk.buffers, list):
        chunk = chunk.module
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


def _chain(optimizer: Any) -> list[Any]:
    """Torch's optimizers inside Megatron's."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part.optimizer for part in parts]


def _bytes(tensors: Iterable[Any], seen: set[int]) -> int:
    """Return bytes of the storages of tensors, without those already seen."""
    import torch

    total = 0
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _exchanged(found: dict[str, int]) -> set[int]:
    """Bytes of what data-parallel ranks exchange, and of a rank's share of it: gloo copies it, in threads that the
    profiler does not see release it; NCCL works in place."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return {found[part] // share for part in ("gradients", "weights") for share in (1, ranks)} if ranks > 1 else set()


def _peak(profiler: Any, left_out: set[int]) -> dict[str, Any]:
    """The most that was allocated, in bytes above the start, and at that moment the bytes in blocks of each size.

    Args:
        left_out: sizes of blocks that do not count.
    """
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events = [event for event in events if abs(event.nbytes()) not in left_out]
    most, blocks = 0, Counter[int]()
    at_peak: dict[int, int] = {}
    for event in sorted(events, key=lambda event: event.start_ns()):
        blocks[abs(event.nbytes())] += event.nbytes()
        if blocks.total() > most:
            most, at_peak = blocks.total(), dict(blocks)
    return {"step": most, "at_peak": at_peak}


if __name__ == "__main__":
    main(load)
