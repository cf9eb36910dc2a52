"""`recipes.distill` with measurements of its steps, written to `step.json` in its folder. It ends after them.

Seconds of each step after the first ones, the peak memory of these steps, and the kernels of some more steps.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.stage import Stage
from prune_distill.schema import RunConfig
from recipes.__main__ import load_stage, main
from tests.benchmarks.gpu import kernels

RESULT = "step.json"
# Steps that warm up (the first ones choose kernels and allocate), that are timed, and that are profiled.
WARM_UP, TIMED, PROFILED = 3, 7, 1


def load(stage: Stage) -> Any:
    """`recipes.distill` with one more callback, and with ranges around the loss and the optimizer."""
    module: Any = load_stage(stage)
    from prune_distill.training import training

    def run(cfg: RunConfig, inputs: Any, out: Path) -> dict[str, Any]:
        make_trainer, probe = training._trainer, _probe(out / RESULT)
        training._trainer = lambda cfg, callbacks: make_trainer(cfg, [*callbacks, probe])
        _open_range_in_loss()
        return module.run(cfg, inputs, out)

    return SimpleNamespace(Inputs=module.Inputs, run=run)


def _open_range_in_loss() -> None:
    import torch

    from prune_distill.distillation import distillation

    compute = distillation.distillation_loss

    def in_range(*args: Any) -> Any:
        with torch.profiler.record_function(kernels.LOSS):
            return compute(*args)

    distillation.distillation_loss = in_range


def _open_range_in_optimizer(optimizer: Any) -> None:
    import torch

    step = optimizer.step

    def in_range(*args: Any, **options: Any) -> Any:
        with torch.profiler.record_function(kernels.OPTIMIZER):
            return step(*args, **options)

    optimizer.step = in_range


def _probe(target: Path) -> Any:
    import torch
    from lightning.pytorch.callbacks import Callback

    from prune_distill.nemo import backend, devices

    cuda = devices.torch_device() == "cuda"

    class Probe(Callback):
        """Measures after each step; ends the process after the last one."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.seconds: list[float] = []
            self.found: dict[str, Any] = {"start_peak": backend.activate().peak_memory_bytes()}
            (optimizer,) = trainer.optimizers
            # Megatron's optimizer: clipping, Adam, and the copies of weights between fp32 and bf16.
            _open_range_in_optimizer(optimizer.mcore_optimizer)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            devices.synchronize()
            now, step = time.perf_counter(), trainer.global_step
            if step == WARM_UP and cuda:
                torch.cuda.reset_peak_memory_stats()
            if WARM_UP < step <= WARM_UP + TIMED:
                self.seconds.append(now - self.last)
            if step == WARM_UP + TIMED:
                self._stop_timing(float(trainer.callback_metrics["reduced_train_loss"]))
            elif step == WARM_UP + TIMED + PROFILED:
                self._stop_profiling()
            self.last = time.perf_counter()

        def _stop_timing(self, loss: float) -> None:
            self.found |= {"seconds": self.seconds, "loss": loss, "peak": backend.activate().peak_memory_bytes()}
            if cuda:
                free, total = torch.cuda.mem_get_info()
                self.found |= {"reserved": torch.cuda.max_memory_reserved(), "used": total - free}
            write_json(target, self.found)
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [torch.profiler.ProfilerActivity.CUDA] if cuda else []
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.start()

        def _stop_profiling(self) -> None:
            self.profiler.stop()
            trace = target.with_name("trace.json")
            self.profiler.export_chrome_trace(str(trace))
            groups, busy = kernels.seconds_by_group(json.loads(trace.read_text())["traceEvents"])
            trace.unlink()
            self.found["groups"] = {name: seconds / PROFILED for name, seconds in groups.items()}
            write_json(target, self.found | {"busy": busy / PROFILED})
            # At the end of a training a model would be written, which takes longer than all of this.
            os._exit(0)

    return Probe()


if __name__ == "__main__":
    main(load)
