"""python -m tests.benchmarks.bench_prune [--seeds 3] [--steps 160] [--teacher RUN_DIR]

Pruning on the demo's teacher, through the real command lines:

- exactness: every axis, all together and named layers, compared with ModelOpt on the same scores;
- cost of a further candidate, compared with the first: wall time of whole stages, with processes and imports;
- quality: the search's choice at a budget of two thirds of the parameters, compared with two manual choices like those
  that are published, after the same number of steps of distillation (including successive halving), per seed. The
  four candidates of successive halving are distilled for half of these steps, two of them for nearly all, because the
  ranking changes that late.

Writes runs/bench/prune.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch.planning.automatic import compose
from prune_distill.pipeline.artifact import locate, read_manifest, write_json

ROOT = Path(__file__).parents[2]
NO_SIZES = ("prune.num_layers=null", "prune.ffn_hidden_size=null")
BUDGET = (*NO_SIZES, "prune.budget.params_fraction=0.667")
# By hand: four of six layers, the share that is published for Qwen3-8B, which is 70 % of the parameters and so above
# the budget; and all layers, as wide as the budget allows.
HAND = {
    "depth": (*NO_SIZES, "prune.num_layers=4"),
    "width": (*NO_SIZES, "prune.hidden_size=192", "prune.ffn_hidden_size=640"),
}
ARMS = ("search", *HAND)
JOBS: tuple[dict[str, Any], ...] = (
    {"ffn_hidden_size": 512},
    {"hidden_size": 192},
    {"num_attention_heads": 2, "num_query_groups": 2},
    {"num_attention_heads": 2, "num_query_groups": 1},
    {"num_layers": 4},
    {"hidden_size": 192, "ffn_hidden_size": 512, "num_layers": 5, "num_attention_heads": 2, "num_query_groups": 1},
    {"hidden_size": 192, "drop_layers": [3, 4]},
    {"drop_layers": [3, 4]},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=160, help="of distillation, each arm")
    parser.add_argument("--teacher", type=Path, help="a demo's run folder with its teacher; made where not given")
    args = parser.parse_args()
    folder = ROOT / "runs" / "bench" / "prune"
    shutil.rmtree(folder, ignore_errors=True)
    teacher = args.teacher or folder / "teacher"
    launch("experiment=demo", f"run_dir={teacher}", "--until", "hf_to_nemo")
    result = {**exactness(teacher, folder / "exact"), **rescoring(teacher, folder / "rescore")}
    arms = [quality(teacher, folder / f"seed-{seed}", seed, args.steps) for seed in range(1, args.seeds + 1)]
    result |= {
        "search_not_worse_seeds": not_worse(arms),
        "seeds": len(arms),
        "steps": args.steps,
        "arms": arms,
    }
    print(table(result))
    write_json(ROOT / "runs" / "bench" / "prune.json", result)


def not_worse(arms: list[dict[str, Any]]) -> int:
    """On how many seeds the search's loss is no higher than the best choice's by hand."""
    return sum(arm["search"]["val_loss"] <= min(arm[name]["val_loss"] for name in HAND) for arm in arms)


def exactness(teacher: Path, folder: Path) -> dict[str, Any]:
    """Whether every tensor equals ModelOpt's, on one pipeline stage."""
    launch("experiment=demo", f"run_dir={copied(teacher, folder)}", "--until", "importance")
    located = locate(compose(["experiment=demo", f"run_dir={folder}"]))
    inputs = [str(located["hf_to_nemo"].folder / "nemo"), str(located["importance"].folder), str(folder)]
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.prune_directly", *inputs, *map(json.dumps, JOBS)]
    output = run(command)
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(lines) == len(JOBS), output[-2000:]
    equal = all(not line["differ"] and line["kept"] == line["wanted"] for line in lines)
    return {"tensors_equal_modelopt": equal, "tensors_compared": sum(line["tensors"] for line in lines)}


def rescoring(teacher: Path, folder: Path) -> dict[str, Any]:
    """Seconds of the first candidate, from the teacher to its score, and of each later one.

    The first takes stages importance and search with one candidate; the later ones are what more candidates add.
    """
    copied(teacher, folder)
    # Published settings of calibration; a shape is a candidate.
    settings = (
        *BUDGET,
        "prune.calibration_samples=1024",
        "prune.budget.max_depth_pruning=0.5",
        "prune.budget.layer_sets=1",
    )
    seconds, counts = {}, {}
    for most in (1, 64):
        overrides = ["experiment=demo", f"run_dir={folder}", *settings, f"prune.budget.max_candidates={most}"]
        launch(*overrides, "--until", "search")
        for stage in ("importance", "search"):
            manifest = read_manifest(locate(compose(overrides))[stage].folder)
            assert manifest is not None
            seconds[stage, most] = manifest["seconds"]
        counts[most] = manifest["metrics"]["candidates"]
    first = seconds["importance", 1] + seconds["search", 1]
    later = (seconds["search", 64] - seconds["search", 1]) / (counts[64] - counts[1])
    return {
        "first_candidate_seconds": first,
        "later_candidate_seconds": later,
        "rescore_ratio": later / first,
        "rescored_candidates": counts[64],
    }


def quality(teacher: Path, folder: Path, seed: int, steps: int) -> dict[str, Any]:
    """Held-out loss and sizes of each arm. The teacher is the demo's for every seed; calibration and batches differ."""
    demo = locate(compose(["experiment=demo", f"run_dir={teacher}"]))["demo_model"].folder
    common = [
        *("model=local", "model.name=demo", "model.family=qwen3", f"model.hf_path={demo / 'hf'}", "name=bench"),
        *("data=jsonl", f"data.train=[{demo / 'corpus' / 'train.jsonl'}]"),
        f"data.validation=[{demo / 'corpus' / 'validation.jsonl'}]",
        *("distill=demo", "evaluate=demo", "distill.controls=[]", f"distill.max_steps={steps}"),
        *("prune.calibration_samples=256", "prune.calibration_seq_length=256", "prune.micro_batch_size=4"),
        *("convert.export_dtype=fp32", f"run_dir={folder}", f"seed={seed}"),
    ]
    tokens = (steps - 1) // 2 * 1024
    successive_halving = (f"prune.successive_halving.round_tokens={tokens}", "prune.successive_halving.candidates=4")
    arms: dict[str, Any] = {"seed": seed}

    def run_arm(name: str, *overrides: str) -> None:
        launch(*common, *overrides, "--until", "distill")
        located = locate(compose([*common, *overrides]))
        pruned, distilled = (read_manifest(located[stage].folder) for stage in ("prune", "distill"))
        assert pruned is not None
        assert distilled is not None
        arms[name] = {"params": pruned["metrics"]["params"], "val_loss": distilled["metrics"]["val_loss"]}
        if name == "search":
            manifest = read_manifest(located["successive_halving"].folder)
            assert manifest is not None
            arms[name]["choice"] = manifest["metrics"]["choice"]
        print(seed, name, arms[name], flush=True)

    run_arm("search", *BUDGET, *successive_halving)
    for name, overrides in HAND.items():
        run_arm(name, *overrides)
    return arms


def table(result: dict[str, Any]) -> str:
    lines = [
        f"tensors equal to ModelOpt's: {result['tensors_equal_modelopt']} ({result['tensors_compared']} compared)",
        f"first candidate {result['first_candidate_seconds']:.1f} s, each later one "
        f"{result['later_candidate_seconds']:.2f} s: {result['rescore_ratio']:.1%}",
        f"held-out loss after {result['steps']} steps of distillation, and millions of parameters",
        f"{'seed':>4} {'search':>16} {'depth by hand':>16} {'width by hand':>16}",
    ]
    for arm in result["arms"]:
        cells = [f"{arm[name]['val_loss']:.4f} ({arm[name]['params'] / 1e6:.2f})" for name in ARMS]
        lines.append(f"{arm['seed']:>4} " + " ".join(f"{cell:>16}" for cell in cells))
    won = result["search_not_worse_seeds"]
    lines.append(f"the search is no worse than the best by hand on {won} of {result['seeds']} seeds")
    return "\n".join(lines)


def copied(teacher: Path, folder: Path) -> Path:
    """A run folder with the stages that the teacher's has, whatever pruning has left in it."""
    left_out = shutil.ignore_patterns("importance*", "search*", "successive_halving*", "prune-*", "distill*", ".lock")
    shutil.copytree(teacher, folder, symlinks=True, ignore=left_out)
    return folder


def launch(*arguments: str) -> None:
    run([sys.executable, "-m", "launch.run", *arguments])


def run(command: list[str]) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
