"""python -m tests.benchmarks.bench_distill [--rounds 3] [--skip-quality]: compares distillation with references.

1. The loss with both output layers, and ModelOpt's LogitsKLLoss: memory, time, largest difference of the gradients.
2. A step of the demo's distillation, and a plain PyTorch loop with the same models, batch, precision and threads; and
   with the teacher's cached logits stored.
3. The quality of each way to train, three seeds, two students (`tests/benchmarks/quality.py`; takes most of the time).

Runs are interleaved, and medians are reported. Prints tables and writes runs/bench/distill.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.metrics_file import read_metrics
from tests.benchmarks import quality
from tests.benchmarks.quality import ROOT
from tests.benchmarks.turns import Runner, take_turns

_ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
TARGET = ROOT / "runs" / "bench"
# Tokens of one loss: the second shows whether memory grows with them.
TOKENS, MORE_TOKENS = 1024, 2048
STEPS, WARM_UP = 200, 5
SEQUENCE, BATCH = 256, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of part 1, of which the median is taken")
    parser.add_argument("--skip-quality", action="store_true", help="skip part 3")
    args = parser.parse_args()
    TARGET.mkdir(parents=True, exist_ok=True)
    result = {**loss_cost(args.rounds), **gradients()}
    print(json.dumps(result, indent=1), flush=True)
    folder = TARGET / "distill"
    teacher = quality.teacher_of_the_demo(folder / "teacher")
    result |= steps(folder)
    write_json(TARGET / "distill.json", result)  # quality takes long, and may be left for another day
    print(json.dumps(result, indent=1), flush=True)
    if not args.skip_quality:
        result["quality"] = quality.measure(folder, teacher, [*quality.COMPARED], [*quality.SEEDS])
        write_json(TARGET / "distill.json", result)
    print(table(result))


def loss_cost(rounds: int) -> dict[str, Any]:
    """Memory and time of a loss, ours and upstream's."""
    runs: dict[str, list[dict[str, float]]] = {}
    for number in range(rounds):
        for arm, tokens in (("upstream", TOKENS), ("ours", TOKENS), ("ours", MORE_TOKENS)):
            one = _json_of("tests.benchmarks.loss_cost", arm, str(tokens))
            runs.setdefault(f"{arm}_{tokens}", []).append(one)
            print(
                f"round {number + 1}: {arm}, {tokens} tokens: {one['seconds']:.1f} s, {one['peak_mb']:.0f} MB",
                flush=True,
            )
    ours, more, theirs = runs[f"ours_{TOKENS}"], runs[f"ours_{MORE_TOKENS}"], runs[f"upstream_{TOKENS}"]
    return {
        "loss_memory_ratio": median(_ratios(ours, theirs, "peak_mb")),
        "loss_time_ratio": median(_ratios(ours, theirs, "seconds")),
        "loss_memory_of_twice_the_tokens": median(_ratios(more, ours, "peak_mb")),
        "loss_peak_mb": {name: median(one["peak_mb"] for one in of) for name, of in runs.items()},
        "loss_seconds": {name: median(one["seconds"] for one in of) for name, of in runs.items()},
    }


def _ratios(ours: list[dict[str, float]], theirs: list[dict[str, float]], key: str) -> list[float]:
    return [mine[key] / other[key] for mine, other in zip(ours, theirs, strict=True)]


def gradients() -> dict[str, Any]:
    """The largest relative difference from LogitsKLLoss, whole and sliced vocabularies."""
    from tests.helpers.kd_reference import CASES, SLICED, differences
    from tests.helpers.ranks import run_ranks

    apart: dict[str, list[float]] = {"forward": [], "reverse": [], "loss": []}
    for ranks, cases in ((1, CASES), (2, SLICED)):
        for result in run_ranks(differences, ranks, cases):
            for case, difference in zip(cases, result, strict=True):
                apart["reverse" if case.reverse else "forward"].append(difference["gradient"])
                apart["loss"].append(difference["loss"])
    return {
        "grad_max_rel_diff": max(apart["forward"]),
        "grad_max_rel_diff_reverse_kl": max(apart["reverse"]),
        "loss_max_rel_diff": max(apart["loss"]),
    }


def steps(folder: Path) -> dict[str, Any]:
    """Steps a second of the demo's distillation, a bare loop's, and those with cached logits."""
    from launch.planning.automatic import compose
    from prune_distill.data.folder import DataFolder
    from prune_distill.pipeline.artifact import locate

    def overrides(run_dir: Path) -> list[str]:
        return [
            *("experiment=demo", f"run_dir={run_dir}", "distill.controls=[]", f"distill.max_steps={STEPS}"),
            *("distill.log_every_n_steps=1", "distill.save_every_n_steps=1000", "distill.val_batches=1"),
            *("distill.kd.kd_weight=1", "distill.kd.lm_weight=0"),
        ]

    run_dir, stored_dir = folder / "teacher", folder / "stored"
    common = overrides(run_dir)
    _run("-m", "launch.run", *common, "--until", "prune")
    stages = locate(compose(common))
    # Two runs at once need a folder each; what comes before distillation is the same.
    shutil.rmtree(stored_dir, ignore_errors=True)
    shutil.copytree(run_dir, stored_dir, ignore=shutil.ignore_patterns("distill*"))
    stored = [*overrides(stored_dir), "distill.teacher_logits=cached"]
    _run("-m", "launch.run", *stored, "--until", "cache_logits")
    teacher, student = stages["demo_model"].folder / "hf", folder / "pruned_hf"
    pruned = stages["prune"].folder / "nemo"
    export = ["--checkpoint", str(pruned), "--hf-model", str(teacher), "--out", str(student), "--dtype", "keep"]
    _run("-m", "convert.nemo_to_hf", *export)
    tokens, lines = folder / "tokens.npy", folder / "plain.jsonl"
    _save_tokens(DataFolder.read(stages["prepare_data"].folder), tokens)
    lines.write_text("")
    runners = [_distillation("ours", common), _distillation("stored", stored)]
    plain = ["-m", "tests.benchmarks.plain_kd", str(teacher), str(student), str(tokens), str(STEPS)]
    runners.append(
        Runner("plain", lambda: _start(plain, lines), lambda: [line["seconds"] for line in read_metrics(lines)])
    )
    rounds = []
    for medians in take_turns(runners, STEPS, WARM_UP):
        rounds.append(medians)
        print(", ".join(f"{name} {seconds:.3f} s a step" for name, seconds in medians.items()), flush=True)
    return {
        "step_throughput_vs_plain": median(of["plain"] / of["ours"] for of in rounds),
        "stored_signal_speedup": median(of["ours"] / of["stored"] for of in rounds),
        "step_seconds": {name: median(of[name] for of in rounds) for name in rounds[0]},
        "step_rounds": len(rounds),
    }


def _distillation(name: str, overrides: list[str]) -> Runner:
    from launch.planning.automatic import compose
    from prune_distill.pipeline.artifact import locate

    folder = locate(compose(overrides))["distill"].folder

    def seconds() -> list[float]:
        lines = read_metrics(folder / "metrics.jsonl")
        return [BATCH * SEQUENCE / line["tokens_per_second"] for line in lines if "loss" in line]

    def start() -> subprocess.Popen[bytes]:
        shutil.rmtree(folder, ignore_errors=True)
        return _start(["-m", "launch.run", *overrides, "--until", "distill"])

    return Runner(name, start, seconds)


def _save_tokens(data: Any, target: Path) -> None:
    import numpy as np

    np.save(target, data.tokens("train")[: STEPS * BATCH * SEQUENCE])


def _start(arguments: list[str], output: Path | None = None) -> subprocess.Popen[bytes]:
    with open(output or os.devnull, "wb") as sink:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=_ENV, stdout=sink, stderr=subprocess.DEVNULL
        )


def _run(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=_ENV, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return done.stdout


def _json_of(module: str, *arguments: str) -> dict[str, Any]:
    """What a module prints as its last line."""
    content: dict[str, Any] = json.loads(_run("-m", module, *arguments).splitlines()[-1])
    return content


def table(result: dict[str, Any]) -> str:
    rows = [
        ("memory of loss and output layers / upstream's", "<= 0.25", result["loss_memory_ratio"]),
        ("the same for twice the tokens / once", "1", result["loss_memory_of_twice_the_tokens"]),
        ("time of loss and output layers / upstream's", "<= 1.0", result["loss_time_ratio"]),
        ("largest relative difference of gradients", "<= 1e-6", result["grad_max_rel_diff"]),
        ("steps a second / bare PyTorch's", ">= 0.95", result["step_throughput_vs_plain"]),
        ("steps a second with cached logits / without", ">= 1.3", result["stored_signal_speedup"]),
    ]
    lines = ["| | asked | measured |", "|---|---|---|"]
    lines += [f"| {name} | {asked} | {value:.3g} |" for name, asked, value in rows]
    return "\n".join([*lines, *(["", quality.table(result["quality"])] if "quality" in result else [])])


if __name__ == "__main__":
    main()
