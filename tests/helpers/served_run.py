"""A run of tiny models that vLLM's build for CPUs serves: all that quantization, evaluation and benchmark read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from launch.environment import ROOT
from launch.planning.automatic import compose
from prune_distill.config.load import save_resolved
from prune_distill.pipeline.artifact import Located, locate, write_manifest
from prune_distill.pipeline.names import RESOLVED
from tests.helpers.quantized import write_documents, write_student

# What vLLM's kernels for CPUs take: multiples of 32 (int4) and, with AMX, of 128.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
WEIGHTS = "model.safetensors"
# Compiling takes longer than all that is generated here.
COMPILE_NOTHING = {"TORCHDYNAMO_DISABLE": "1", "VLLM_USE_AOT_COMPILE": "0"}
SETTINGS = (
    *("quantize.formats=[fp8]", "quantize.calibration_seq_length=32"),
    *("evaluate.engine=vllm", "evaluate.seq_length=32", "evaluate.micro_batch_size=2", "evaluate.continuations=null"),
    *("evaluate.samples=1", "evaluate.sample_prompt_tokens=8", "evaluate.sample_new_tokens=4"),
    *("benchmark.engine=vllm", "benchmark.batch_size=2", "benchmark.prompt_tokens=16", "benchmark.new_tokens=4"),
    *("benchmark.rounds=2", "benchmark.requests=4", "benchmark.request_rates=[8,null]"),
)


def write_run(run_dir: Path, *overrides: str) -> dict[str, Located]:
    """Write a run whose teacher, data and exported student are complete; returns its stages."""
    cfg = compose(["experiment=demo", f"run_dir={run_dir}", *SETTINGS, *overrides])
    run_dir.mkdir(parents=True, exist_ok=True)
    save_resolved(cfg, run_dir / RESOLVED)
    stages = locate(cfg)
    if not stages["nemo_to_hf"].complete:
        teacher = write_student(stages["demo_model"].folder / "hf", "qwen3_tied", **SIZES)
        write_documents(stages["prepare_data"].folder)
        student = write_student(stages["nemo_to_hf"].folder / "student", "qwen3_tied", **SIZES, num_hidden_layers=2)
        # The teacher without its last layer.
        kept, weights = load_file(student / WEIGHTS), load_file(teacher / WEIGHTS)
        save_file({name: weights[name] for name in kept}, student / WEIGHTS, metadata={"format": "pt"})
        for name in ("demo_model", "prepare_data", "nemo_to_hf"):
            write_manifest(stages[name], 1.0, 2.0, {})
    return stages


def environment() -> dict[str, str]:
    """The environment of a stage."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **COMPILE_NOTHING}


def start(run_dir: Path, stage: str) -> subprocess.Popen[str]:
    """Start a stage as the launcher does; its messages go to a file beside the run."""
    command = [sys.executable, "-m", "recipes", stage, "--config", str(run_dir / RESOLVED)]
    with log_of(run_dir, stage).open("a") as log:
        return subprocess.Popen(command, env=environment(), stdout=log, stderr=log, text=True)


def run(run_dir: Path, stage: str) -> None:
    """Run a stage to its end."""
    process = start(run_dir, stage)
    assert process.wait(900) == 0, log_of(run_dir, stage).read_text()[-4000:]


def log_of(run_dir: Path, stage: str) -> Path:
    return run_dir.parent / f"{stage}.log"
