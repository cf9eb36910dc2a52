"""Run folders with the outputs of stages, for tests of the report. The numbers are made up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from launch.planning.automatic import compose
from prune_distill.config.load import save_resolved
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.names import LAUNCHES, PLAN, RESOLVED

STARTED = 1_795_506_164.0
MODELS = {"teacher": 3.58, "pruned": 3.72, "student": 3.547, "ce": 3.581}
STAGES = {
    "demo_model": 224.0,
    "prepare_data": 6.0,
    "hf_to_nemo": 9.0,
    "verify_import": 8.0,
    "importance": 14.0,
    "search": 31.0,
    "successive_halving": 80.0,
    "prune": 11.0,
    "distill": 62.0,
    "distill.ce": 47.0,
    "nemo_to_hf": 8.0,
    "verify": 8.0,
    "evaluate": 40.0,
    "evaluate.fp8": 18.0,
    "evaluate.ce": 20.0,
    "benchmark": 60.0,
}
# Strings that must not appear in a report, although they are in a run's files.
SECRETS = ("hunter2", "hf_AbCdEfGhIjKlMnOpQrSt", "5eC2eT5eC2eT", "/home/alice", "/root/runs", "s3cr3tWandbKey0123")
HOSTILE = "<script>alert('x')</script> & \"quotes\""


def folder_of(run_dir: Path, stage: str) -> Path:
    return run_dir / f"{stage}-{0x5EED0000 + list(STAGES).index(stage):08x}"


def model(name: str, loss: float) -> dict[str, Any]:
    teacher = name == "teacher"
    entry: dict[str, Any] = {
        "params": 5_246_976 if teacher else 3_279_616,
        "num_layers": 6 if teacher else 4,
        "hidden_size": 256,
        "ffn_hidden_size": 768 if teacher else 640,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "val_loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss * 0.564,
        "tokens": 46_848,
        "per_source": {
            "web": {"val_loss": loss - 0.1, "tokens": 30_000},
            "code": {"val_loss": loss + 0.2, "tokens": 16_848},
        },
        "tasks": {"held_out_choice": {"acc": {"value": 0.7 - (loss - 3.5) / 2, "stderr": 0.021}, "samples": 480}},
    }
    if not teacher:
        entry["agreement"] = {"top1": 0.9 - (loss - 3.5), "kl": (loss - 3.5) / 4}
    return entry


def spread(median: float) -> dict[str, float]:
    return {"median": median, "min": median * 0.96, "max": median * 1.05}


def benchmark() -> dict[str, Any]:
    def of(speed: float) -> dict[str, Any]:
        return {
            "prefill_tokens_per_second": spread(9000 * speed),
            "decode_tokens_per_second": spread(210 * speed),
            "time_to_first_token_seconds": spread(0.028 / speed),
            "peak_memory_bytes": round(52e6 / speed),
            "weights_bytes": round(21e6 / speed),
            "kv_cache_bytes": round(4e6 / speed),
            "seconds_per_token": 0.01 / speed,
            "joules_per_token": None,
            "cost_per_million_tokens": None,
        }

    ratios = {"prefill": spread(1.44), "decode": spread(1.43), "time_to_first_token": spread(0.7), "memory": 0.66}
    return {
        "engine": "transformers",
        "command": "python -m recipes benchmark --config /home/alice/run/resolved.yaml",
        "device": "a processor",
        "dtype": "float32",
        "threads": 2,
        "batch_size": 4,
        "prompt_tokens": 128,
        "new_tokens": 64,
        "rounds": 7,
        "models": {"teacher": of(1.0), "student": of(1.43)},
        "ratios": {"student": ratios},
    }


def served() -> dict[str, Any]:
    """A benchmark with vLLM, at two rates of requests."""
    result = {**benchmark(), "engine": "vllm", "engine_version": "0.32.0", "requests": 64}
    result["models"]["student_fp8"] = result["models"]["student"]
    result["ratios"]["student_fp8"] = result["ratios"]["student"]
    for number, model in enumerate(result["models"].values(), 1):
        model["load"] = [load(rate, number) for rate in (2.5, None)]
    for ratios in result["ratios"].values():
        ratios["load"] = [load(rate, 0.01) for rate in (2.5, None)]
    return result


def load(rate: float | None, factor: float) -> dict[str, Any]:
    speed = (160 if rate is None else 80) * factor
    times = {
        "time_to_first_token_seconds": 0.2,
        "slow_time_to_first_token_seconds": 0.9,
        "seconds_per_output_token": 0.03,
    }
    spreads = {name: spread(seconds / factor) for name, seconds in times.items()}
    return {"request_rate": rate, "output_tokens_per_second": spread(speed), **spreads}


def candidate(layers: int, ffn: int, loss: float, rounds: int) -> dict[str, Any]:
    row = {
        "num_layers": layers,
        "hidden_size": 256,
        "ffn_hidden_size": ffn,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "params": 524_288 + layers * (196_608 + 768 * ffn),
        "memory_gb": 0.02,
        "latency_ms": layers * (1 + ffn / 1000),
        "drop_layers": list(range(3, 9 - layers)),
        "loss": loss,
        "kl": loss - 3.5,
        "front": loss < 3.9,
    }
    ended = [{"step": 20 * number, "val_loss": loss - 0.05 * number} for number in range(1, rounds + 1)]
    return {**row, "rounds": ended} if rounds else row


def candidates(rounds: bool) -> dict[str, Any]:
    shapes = [(6, 384, 3.81), (5, 512, 3.76), (4, 640, 3.92), (4, 704, 3.88), (5, 448, 3.84), (6, 320, 3.95)]
    rows = [candidate(*shape, rounds=2 - index if rounds and index < 2 else 0) for index, shape in enumerate(shapes)]
    return {"teacher": candidate(6, 768, 3.58, 0), "candidates": rows}


def importance() -> dict[str, Any]:
    rows = [
        {
            "layer": layer,
            "score": abs(layer - 3.5) / 3,
            "heads": [0.5 + head * layer / 20 for head in range(4)],
            "query_groups": [0.7, 0.9],
            "ffn_quantiles": [0.1, 0.3, 0.5 + layer / 20, 0.8, 1.3],
        }
        for layer in range(1, 7)
    ]
    return {"layers": rows, "quantiles": [0.05, 0.25, 0.5, 0.75, 0.95], "hidden_size": [1 / (n + 1) for n in range(64)]}


def metrics(final: float, steps: int = 160) -> str:
    lines: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        loss = final + 0.4 / step + 0.02 * math.sin(step)
        lines.append(
            {"step": step, "max_steps": 160, "tokens": step * 1024, "loss": loss, "seconds_left": 160.0 - step}
        )
        if step % 40 == 0:
            lines.append({"step": step, "val_loss": final + 4 / step})
    return "".join(json.dumps(line) + "\n" for line in lines)


def begin(run_dir: Path, *overrides: str) -> None:
    """Write the files of a run without stages."""
    run_dir.mkdir(parents=True, exist_ok=True)
    cfg = compose(["experiment=demo", f"run_dir={run_dir}", *overrides])
    save_resolved(cfg, run_dir / RESOLVED)
    plan = {
        "models": {"teacher": {"parameters": 5_246_976}, "student": {"parameters": 3_279_616}},
        "training": {"steps": 160, "tokens": 163_840},
        "stages": [{"stage": "distill", "hours": 0.016}],
        "memory": {"distill": [{"total": 120_000_000}]},
        "disk": {"total": 700_000_000},
    }
    write_json(run_dir / PLAN, plan)
    command = f"python -m launch.run experiment=demo run_dir={run_dir}"
    (run_dir / LAUNCHES).write_text(json.dumps({"time": STARTED, "command": command}) + "\n")


def complete(run_dir: Path, stage: str, stage_run_folder: dict[str, Any] | None = None, **more: Any) -> Path:
    """A stage's folder with its log and manifest; `stage_run_folder` are its metrics."""
    folder = folder_of(run_dir, stage)
    folder.mkdir(parents=True, exist_ok=True)
    names = list(STAGES)
    started = STARTED + sum(STAGES[name] + 2 for name in names[: names.index(stage)])
    (folder / "log.txt").write_text(f"--- 2026-11-24 07:42:44 +0000 python -m recipes {stage}\nworking\n")
    manifest = {
        "stage": stage,
        "status": "complete",
        "config_hash": "0" * 64,
        "inputs": {},
        "versions": {"torch": "2.13.0"},
        "git_commit": "0123456789ab",
        "started": started,
        "ended": started + STAGES[stage],
        "seconds": STAGES[stage],
        "metrics": stage_run_folder or {},
        **more,
    }
    write_json(folder / "manifest.json", manifest)
    return folder


def finished(run_dir: Path, *overrides: str, losses: dict[str, float] = MODELS) -> Path:
    """Write a run with everything that a report can show."""
    begin(run_dir, *overrides)
    for stage in ("demo_model", "prepare_data", "hf_to_nemo", "nemo_to_hf"):
        complete(run_dir, stage)
    write_json(complete(run_dir, "importance") / "importance.json", importance())
    for stage in ("search", "successive_halving"):
        folder = complete(run_dir, stage)
        write_json(folder / "candidates.json", candidates(stage == "successive_halving"))
        write_json(folder / "choice.json", candidates(stage == "successive_halving")["candidates"][1])
    complete(run_dir, "prune", {"params_before": 5_246_976, "params": 3_279_616, "kept_layers": [1, 2, 5, 6]})
    for stage, name in (("distill", "student"), ("distill.ce", "ce")):
        stage_run_folder = {"backend": "cpu", "steps": 160, "tokens": 163_840, "val_loss": losses[name]}
        folder = complete(
            run_dir, stage, stage_run_folder, peak_memory={"host_bytes": 1_500_000_000, "gpu_bytes": None}
        )
        (folder / "metrics.jsonl").write_text(metrics(losses[name]))
    complete(run_dir, "verify_import", {"tokens": 256, "import_max_abs_logit_diff": 6.7e-6})
    complete(run_dir, "verify", {"tokens": 256, "export_max_abs_logit_diff": 7.6e-6})
    inputs = {name: {"path": f"nemo_to_hf-0000/{name}", "hash": "0"} for name in losses}
    measured = {name: model(name, loss) for name, loss in losses.items()}
    control = complete(run_dir, "evaluate.ce", {"ce": measured.pop("ce")}, inputs=inputs)
    folder = complete(run_dir, "evaluate", measured, inputs=inputs)
    recovery = [
        {**model("student", losses["student"] + 5 / step), "model": "student", "step": step, "tokens": step * 1024}
        for step in (40, 80, 120, 160)
    ]
    write_json(folder / "recovery.json", recovery)
    texts = {"teacher": "def f(x):\n    return x", "student": HOSTILE}
    beginning = {"prompt": "The import statement", "reference": "of Python"}
    write_json(folder / "samples.json", [{**beginning, "texts": texts}] * 3)
    write_json(control / "samples.json", [{**beginning, "texts": {"ce": "written by the control"}}] * 3)
    write_json(complete(run_dir, "benchmark") / "benchmark.json", benchmark())
    return run_dir


def failed(run_dir: Path) -> Path:
    """Write a run whose distillation was started three times and failed, with secrets in its log."""
    begin(run_dir)
    for stage in ("demo_model", "prepare_data", "hf_to_nemo"):
        complete(run_dir, stage)
    complete(run_dir, "prune", {"params_before": 5_246_976, "params": 3_279_616, "kept_layers": [1, 2, 5, 6]})
    folder = folder_of(run_dir, "distill")
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(metrics(3.6, steps=80) + '{"step": 90, "loss": NaN}\n{"step": 100, "lo')
    (folder / "log.txt").write_text(
        "--- 2026-11-24 07:47:00 +0000 python -m recipes distill\nworking\n"
        "--- 2026-11-24 07:57:00 +0000 python -m recipes distill\nworking\n"
        "--- 2026-11-24 08:07:00 +0000 python -m recipes distill\nworking\n"
        f"error: step 91: the loss is nan in {HOSTILE}\n"
        "  - HF_TOKEN=hf_AbCdEfGhIjKlMnOpQrSt, documents in /home/alice/data/part_0.jsonl\n"
    )
    return run_dir
