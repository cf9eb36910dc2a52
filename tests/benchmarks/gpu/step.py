"""A distillation step of real layer shapes: tokens/s, MFU, peak memory next to the plan's, and where the time goes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from launch.environment import ROOT
from launch.planning.automatic import compose
from launch.planning.memory import fullest
from launch.planning.plan import stage_memory
from prune_distill.config.load import save_resolved
from prune_distill.config.values import utilization_meter
from prune_distill.errors import ConfigError
from prune_distill.nemo import devices
from prune_distill.pipeline.artifact import locate
from prune_distill.schema import RunConfig
from prune_distill.units import GIB
from tests.benchmarks.gpu import models
from tests.benchmarks.gpu.figures import Figures
from tests.benchmarks.gpu.models import Model, Run
from tests.benchmarks.gpu.step_probe import PROFILED, RESULT, TIMED

# Seconds that a measurement takes at the least: imports, loading two models, a few steps.
LEAST_SECONDS = 25.0


def measure(figures: Figures) -> None:
    for model in (models.SMALL, models.BIG):
        name = f"step/{model.name}"
        run = prepare(figures, name, model)
        for micro_batch in sorted(run.micro_batches) if run is not None else ():
            measure_run(figures, f"{name}/micro_batch_{micro_batch}", run, micro_batch)


def prepare(figures: Figures, name: str, model: Model) -> Run | None:
    """Write a model, convert and prune it, unless an earlier part did; None where it does not fit, a stage fails, or no
    time is left."""
    folder = figures.work / model.name
    prepared = folder / "run.pickle"
    if not prepared.exists():
        if figures.left < LEAST_SECONDS:
            figures.missing(name, "", "no time left")
            return None
        made = models.prepare(model, folder, figures.toy)
        if made is None:
            figures.missing(name, "", f"by the plan, not even {models.LEAST_LAYERS} layers fit the GPU's free memory")
            return None
        try:
            launch(made.overrides(1), "--until", "prune")
        except RuntimeError as fault:
            figures.missing(name, "", str(fault))
            return None
        prepared.write_bytes(pickle.dumps(made))
    run: Run = pickle.loads(prepared.read_bytes())
    how = f"for {run.free / GIB:.1f} GiB by the plan; random weights, a teacher of {run.layers} layers"
    figures.add(f"{name}/layers", run.kept, "layers of the student", how)
    figures.add(f"{name}/seq_length", run.seq_length, "tokens", how)
    return run


def launch(overrides: Sequence[str], *flags: str) -> None:
    """`python -m launch.run`. Raises: RuntimeError, with the log of the stage that failed."""
    command = [sys.executable, "-m", "launch.run", *overrides, *flags]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
    if done.returncode:
        run_dir = next(word.partition("=")[2] for word in overrides if word.startswith("run_dir="))
        logs = sorted(Path(run_dir).glob("*/log.txt"), key=lambda path: path.stat().st_mtime)
        log = logs[-1].read_text(errors="replace")[-2000:] if logs else ""
        raise RuntimeError(f"{done.stderr[-1000:]}\n{log}")


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def measure_run(figures: Figures, name: str, run: Run, micro_batch: int, *more: str) -> None:
    """Add the figures of the steps with a micro batch size and more settings."""
    if figures.left < LEAST_SECONDS:
        figures.missing(f"{name}/tokens_per_second", "tokens/s", "no time left")
        return
    try:
        cfg = compose(run.overrides(micro_batch, *more))
        found = _steps(cfg, figures.left)
    except (ConfigError, RuntimeError) as fault:
        figures.missing(f"{name}/tokens_per_second", "tokens/s", str(fault))
        return
    _add_speed(figures, name, cfg, found)
    _add_memory(figures, name, cfg, found)
    _add_groups(figures, name, found)


def _steps(cfg: RunConfig, seconds: float) -> dict[str, Any]:
    """Run the stage `distill` with the probe, and return what that wrote.

    Raises:
        RuntimeError: with the end of its output, if it wrote nothing.
    """
    resolved = Path(cfg.run_dir) / "resolved.yaml"
    save_resolved(cfg, resolved)
    folder = locate(cfg)["distill"].folder
    shutil.rmtree(folder, ignore_errors=True)  # of another micro batch size, which is not part of its name
    command = [sys.executable, "-m", "tests.benchmarks.gpu.step_probe", "distill", "--config", str(resolved)]
    output = ""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds
        )
        output = done.stdout.decode(errors="replace")
    except subprocess.TimeoutExpired as fault:
        output = f"no time left\n{(fault.stdout or b'').decode(errors='replace')}"
    result = folder / RESULT
    if not result.exists():
        memory = [line for line in output.splitlines() if "OutOfMemoryError" in line]
        raise RuntimeError(memory[-1][:300] if memory else output[-1500:])
    content: dict[str, Any] = json.loads(result.read_text())
    return content


def _add_speed(figures: Figures, name: str, cfg: RunConfig, found: dict[str, Any]) -> None:
    training = cfg.distill
    seconds = median(found["seconds"])
    speed = training.global_batch_size * training.seq_length / seconds
    sizes = f"{training.global_batch_size} x {training.seq_length} tokens, micro batch {training.micro_batch_size}"
    how = f"median of {TIMED} steps of {sizes}, each from the end of the one before, synchronized"
    figures.add(f"{name}/tokens_per_second", speed, "tokens/s", how)
    figures.add(f"{name}/step", seconds, "s", how)
    figures.add(f"{name}/loss", found["loss"], "nats per token", "after the timed steps; random weights")
    meter = utilization_meter(cfg)
    if meter is None:
        figures.missing(f"{name}/mfu", "", "conf/cluster/gpu has no peak of this card")
        return
    utilization = meter.utilization(speed, training.seq_length)
    how = f"prune_distill/model/flops.py: student forward and backward, teacher forward; of {meter.peak / 1e12} TFLOP/s"
    figures.add(f"{name}/mfu", utilization, "of the peak", how)


def _add_memory(figures: Figures, name: str, cfg: RunConfig, found: dict[str, Any]) -> None:
    plan = fullest(stage_memory(cfg)["distill"])
    on_cpu = devices.torch_device() == "cpu"
    how = "resident memory of the process" if on_cpu else f"torch.cuda.max_memory_allocated in {TIMED} steps"
    figures.add(f"{name}/peak_memory", found["peak"] / GIB, "GiB", how)
    figures.add(f"{name}/planned_memory", plan.tensors / GIB, "GiB", "launch.plan, tensors without the reserve")
    figures.add(f"{name}/peak_to_plan", found["peak"] / plan.tensors, "x", "peak_memory / planned_memory")
    if on_cpu:
        return
    figures.add(f"{name}/start_peak_memory", found["start_peak"] / GIB, "GiB", "before the first step")
    figures.add(f"{name}/used_memory", found["used"] / GIB, "GiB", "of the GPU, after the steps (cudaMemGetInfo)")
    figures.add(f"{name}/planned_use", plan.total / GIB, "GiB", "launch.plan, with the reserve")
    figures.add(f"{name}/reserved_memory", found["reserved"] / GIB, "GiB", "torch.cuda.max_memory_reserved")


def _add_groups(figures: Figures, name: str, found: dict[str, Any]) -> None:
    """Add the share of a step of each group of kernels, and of the time in which none runs."""
    if not found.get("groups"):
        why = "no kernels in the trace: not a GPU" if devices.torch_device() == "cpu" else "the profiler did not finish"
        figures.missing(f"{name}/share", "of the step", why)
        return
    seconds = median(found["seconds"])
    how = f"torch.profiler, kernels of {PROFILED} more steps by name and range (tests/benchmarks/gpu/kernels.py)"
    for group, of_group in sorted(found["groups"].items()):
        figures.add(f"{name}/share/{group}", of_group / seconds, "of the step", how)
    idle = "1 - kernels' time / unprofiled step; the profiler slows down launches, not kernels"
    figures.add(f"{name}/share/idle", max(0.0, 1 - found["busy"] / seconds), "of the step", idle)
