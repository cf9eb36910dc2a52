"""What each way to train a pruned student gives at the demo's size: the same teacher, students, tokens and steps.

Each arm is a run of the demo's recipe through the real stages, with the settings below. The teacher is trained once;
the seed decides which documents calibration reads and in what order training does. The loss is that on the whole
validation set after the last step, nats per token.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from threading import Lock
from typing import Any

# Hydra composes one config at a time.
_HYDRA = Lock()
ROOT = Path(__file__).resolve().parents[2]
# Both of about two thirds of the teacher's parameters.
STUDENTS = {
    "depth": ("prune.num_layers=4", "prune.ffn_hidden_size=null"),
    "width": ("prune.num_layers=null", "prune.hidden_size=192", "prune.ffn_hidden_size=640"),
}
# Layers of which student and teacher have the same number of others behind them.
PAIRS = {
    "depth": "[{student:2,teacher:4},{student:3,teacher:5}]",
    "width": "[{student:2,teacher:2},{student:4,teacher:4}]",
}
BF16 = ("distill.precision=bf16",)
# A teacher of twice the layers, trained by the demo's recipe for the same steps (9.97 M parameters instead of 5.25 M).
LARGER = ("model.shape.num_layers=12",)
ARMS = {
    "kd": (),
    "kd_t2": ("distill.kd.temperature=2",),
    "reverse_kl": ("distill.kd.divergence=reverse_kl",),
    "jensen_shannon": ("distill.kd.divergence=jensen_shannon",),
    "ce": ("distill.loss=ce",),
    "mix": ("distill.kd.kd_weight=0.5", "distill.kd.lm_weight=0.5"),
    "top_k": ("distill.kd.top_k=64",),
    "stored": ("distill.teacher_logits=cached",),
    "pairs": ("distill.kd.intermediate_pairs={pairs}", "distill.kd.intermediate_weight=0.5"),
    "scratch": ("distill.loss=ce", "distill.init=random"),
    "bf16": BF16,
    "fp8_teacher": (*BF16, "distill.teacher_fp8=true"),
    "fp8_both": (*BF16, "distill.teacher_fp8=true", "distill.fp8=hybrid"),
    "larger_teacher": ("teacher.hf_path={larger}",),
    "fp8_blockwise": (*BF16, "distill.teacher_fp8=true", "distill.fp8=blockwise"),
}
# What the README's table compares; the others are had by name.
COMPARED = ("kd", "ce", "mix", "top_k", "stored", "pairs", "scratch")
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Run:
    arm: str
    student: str
    seed: int

    def overrides(self, teacher: Path, folder: Path) -> list[str]:
        values = {"pairs": PAIRS[self.student], "larger": larger_teacher(folder)}
        corpus = teacher.parent / "corpus"
        return [
            "experiment=demo",
            "model=local",
            "model.family=qwen3",
            f"model.hf_path={teacher}",
            f"data.train=[{corpus / 'train.jsonl'}]",
            f"data.validation=[{corpus / 'validation.jsonl'}]",
            f"run_dir={folder / f'{self.student}-{self.seed}'}",
            f"seed={self.seed}",
            *("distill.controls=[]", "distill.kd.kd_weight=1", "distill.kd.lm_weight=0"),
            *STUDENTS[self.student],
            *(override.format(**values) for override in ARMS[self.arm]),
        ]


def measure(
    folder: Path, teacher: Path, arms: list[str], seeds: list[int], students: Iterable[str] = STUDENTS, workers: int = 2
) -> list[dict[str, Any]]:
    """Runs of one student and seed share a folder, and so what is before distillation; `workers` such are at work at
    once."""
    shares = [[Run(arm, student, seed) for arm in arms] for seed in seeds for student in students]
    with ThreadPoolExecutor(workers) as pool:
        return [
            result for share in pool.map(lambda runs: list(_work(runs, teacher, folder)), shares) for result in share
        ]


def _work(runs: list[Run], teacher: Path, folder: Path) -> Iterator[dict[str, Any]]:
    for run in runs:
        val_loss = distill(run.overrides(teacher, folder))
        print(f"{run.student}, seed {run.seed}, {run.arm}: {val_loss:.4f}", flush=True)
        yield {"arm": run.arm, "student": run.student, "seed": run.seed, "val_loss": val_loss}


def distill(overrides: list[str]) -> float:
    """The validation loss at the end of a distillation, through the command line."""
    from launch.planning.automatic import compose
    from prune_distill.pipeline.artifact import locate, read_manifest

    command = [sys.executable, "-m", "launch.run", *overrides, "--until", "distill"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    with _HYDRA:
        cfg = compose(overrides)
    manifest = read_manifest(locate(cfg)["distill"].folder)
    assert manifest is not None
    return float(manifest["metrics"]["val_loss"])


def table(results: list[dict[str, Any]]) -> str:
    students = list(dict.fromkeys(result["student"] for result in results))
    lines = ["| arm | " + " | ".join(f"{student}: mean (each seed)" for student in students) + " |"]
    lines.append("|---" * (1 + len(students)) + "|")
    for arm in dict.fromkeys(result["arm"] for result in results):
        cells = []
        for student in students:
            losses = [r["val_loss"] for r in results if (r["arm"], r["student"]) == (arm, student)]
            cells.append(f"{mean(losses):.4f} ({', '.join(f'{loss:.4f}' for loss in losses)})")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def teacher_of_the_demo(run_dir: Path, *more: str) -> Path:
    """The demo's teacher as a Hugging Face folder, made if it is not there; `more`: further overrides."""
    overrides = ["experiment=demo", f"run_dir={run_dir}", *more]
    command = [sys.executable, "-m", "launch.run", *overrides, "--until", "demo_model"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    return _demo_folder(overrides)


def larger_teacher(folder: Path) -> Path:
    """Where `teacher_of_the_demo` puts the larger teacher of the runs in `folder`."""
    return _demo_folder(["experiment=demo", f"run_dir={folder / 'larger'}", *LARGER])


def _demo_folder(overrides: list[str]) -> Path:
    from launch.planning.automatic import compose
    from prune_distill.pipeline.artifact import locate

    with _HYDRA:
        return locate(compose(overrides))["demo_model"].folder / "hf"


def main() -> None:
    """By itself: python -m tests.benchmarks.quality FOLDER [ARM ...] [--students depth] [--workers 1]."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("arms", nargs="*", metavar="ARM", default=[*COMPARED], help=", ".join(ARMS))
    parser.add_argument("--students", nargs="+", choices=[*STUDENTS], default=[*STUDENTS])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    teacher = teacher_of_the_demo(folder / "teacher")
    if "larger_teacher" in args.arms:
        teacher_of_the_demo(folder / "larger", *LARGER)
    results = measure(folder, teacher, args.arms, [*SEEDS], args.students, args.workers)
    (folder / "quality.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
