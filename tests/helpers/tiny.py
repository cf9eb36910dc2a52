"""A reduced run of the demo experiment, with seconds per stage: the real stages through the real command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from launch.planning.automatic import compose
from prune_distill.pipeline.artifact import Located, locate
from prune_distill.pipeline.metrics_file import read_metrics
from tests.helpers.fork_server import python_path


@dataclass(frozen=True)
class DistillInputs:
    """Inputs of a helper that replaces `recipes.distill`."""

    student: Path
    teacher: Path
    data: Path


# Odd where it can be: heads of 48 are not hidden_size / num_attention_heads, and 522 is no multiple of 64.
SHAPE = {
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 256,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 48,
    "vocab_size": 522,
}
TEACHER = {
    "max_steps": 40,
    "seq_length": 128,
    "global_batch_size": 8,
    "micro_batch_size": 8,
    "lr": 4e-3,
    "float32_matmul_precision": "highest",
    "warmup_steps": 4,
    "save_every_n_steps": 100,
    "val_every_n_steps": 40,
    "val_batches": 2,
    "num_workers": 0,
}
DISTILL: dict[str, Any] = {
    "max_steps": 6,
    "seq_length": 128,
    "global_batch_size": 4,
    "micro_batch_size": 1,
    "float32_matmul_precision": "highest",  # otherwise the order of sums would matter
    "warmup_steps": 1,
    "save_every_n_steps": 2,
    "keep_checkpoints": 1,
    "val_every_n_steps": 3,
    "val_batches": 2,
    "log_every_n_steps": 1,
    "num_workers": 0,
    # From the teacher alone, as the published recipes do.
    "kd.kd_weight": 1.0,
    "kd.lm_weight": 0.0,
}
DEPTH = ("prune.num_layers=2",)
WIDTH = ("prune.hidden_size=64", "prune.ffn_hidden_size=128")


def overrides(run_dir: Path, *more: str) -> list[str]:
    """The command line of a tiny run: `more` follows, and needs a target for pruning among it."""
    return [
        "experiment=demo",
        f"run_dir={run_dir}",
        *(f"model.shape.{key}={value}" for key, value in SHAPE.items()),
        *(f"model.demo.training.{key}={value}" for key, value in TEACHER.items()),
        *(f"distill.{key}={value}" for key, value in DISTILL.items()),
        "prune.num_layers=null",
        "prune.ffn_hidden_size=null",
        "prune.calibration_samples=16",
        "prune.calibration_seq_length=128",
        "quantize.formats=[]",
        "evaluate.seq_length=128",
        "evaluate.max_sequences=64",
        "evaluate.verify_tokens=128",
        "evaluate.continuations.questions=12",
        "evaluate.samples=2",
        "evaluate.sample_new_tokens=8",
        "benchmark.batch_size=2",
        "benchmark.prompt_tokens=16",
        "benchmark.new_tokens=4",
        "benchmark.rounds=2",
        *more,
    ]


def launch(run_dir: Path, *more: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`python -m launch.run` with a tiny run's overrides."""
    done = subprocess.run(command(run_dir, *more), env=environment(), capture_output=True, text=True, timeout=900)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def convert(module: str, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`python -m convert.MODULE`."""
    command = [sys.executable, "-m", f"convert.{module}", *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def command(run_dir: Path, *more: str) -> list[str]:
    """The arguments of a tiny launch: key=value overrides, and flags."""
    values = [argument for argument in more if "=" in argument]
    flags = [argument for argument in more if "=" not in argument]
    return [sys.executable, "-m", "launch.run", *overrides(run_dir, *values), *flags]


def environment() -> dict[str, str]:
    # One thread per process, so that sums have the same order for any number of ranks.
    return {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}


def stages(run_dir: Path, *more: str) -> dict[str, Located]:
    """Locate the stages of a tiny run."""
    return locate(compose(overrides(run_dir, *more)))


def losses(folder: Path, steps: int = DISTILL["max_steps"]) -> list[float]:
    """The training loss of every step."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    return [line["loss"] for line in lines]


def validations(folder: Path) -> dict[int, float]:
    """Return the held-out losses of a training by step."""
    lines = read_metrics(folder / "metrics.jsonl")
    return {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}


def max_gradient_difference(folder: Path, reference: Path, step: int) -> float:
    """The largest difference of two trainings' first moments in Adam after a step, means of their clipped gradients;
    of the largest one."""
    found, expected = (_moments(one / "checkpoints" / f"step={step}" / "weights") for one in (folder, reference))
    assert expected, reference
    assert found.keys() == expected.keys()
    largest = max(float(np.abs(values).max()) for values in expected.values())
    return max(float(np.abs(found[key] - values).max()) for key, values in expected.items()) / largest


def _moments(weights: Path) -> dict[str, np.ndarray]:
    """Load whole tensors, for any layout."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader, load

    reader = FileSystemReader(weights)
    saved = reader.read_metadata().state_dict_metadata.items()
    tensors = {key: torch.empty(entry.size) for key, entry in saved if "exp_avg." in key}  # type: ignore[union-attr]
    load(tensors, storage_reader=reader, no_dist=True)
    return {key: tensor.numpy() for key, tensor in tensors.items()}


def copy_run(source: Path, target: Path) -> Path:
    """Copy a run folder with its complete stages."""
    left_out = shutil.ignore_patterns("distill*", "nemo_to_hf*", "slurm", ".lock")
    shutil.copytree(source, target, symlinks=True, ignore=left_out)
    resolved = yaml.safe_load((target / "resolved.yaml").read_text())
    (target / "resolved.yaml").write_text(yaml.safe_dump({**resolved, "run_dir": str(target)}))
    return target


def report(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "report" / "report.json").read_text())
    return content


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[Any]) -> None:
    """Wait until a running stage has written its first checkpoint."""
    wait_for("checkpoints/step=*", folder, process)


def wait_for(pattern: str, folder: Path, process: subprocess.Popen[Any]) -> None:
    """Wait until a running stage has written a file or folder that matches a pattern."""
    until = time.monotonic() + 300
    while not list(folder.glob(pattern)):
        assert process.poll() is None, (folder / "log.txt").read_text()[-3000:]
        assert time.monotonic() < until
        time.sleep(0.02)
