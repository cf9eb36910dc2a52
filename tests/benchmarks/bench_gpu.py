"""python -m tests.benchmarks.bench_gpu [--parts loss,step,...] [--seconds 1800] [--toy]: measure on one GPU.

loss      the distillation loss: time, peak memory, error; next to plain PyTorch, torch.compile and the roofline
step      a distillation step at the layer shapes of Qwen3-0.6B and Qwen3-8B: tokens/s, MFU, memory, kernels
pipeline  the whole tiny job with Transformer Engine: logits next to transformers'
resume    a training killed with SIGKILL: its losses next to those of one that was not
convert   import and export of a checkpoint: GB/s
fp8       a distillation step with a teacher in FP8, and with both models

Each part is a process of its own, with a share of the seconds; one that crashes, hangs or needs too much memory costs
only itself. Runs on one GPU of 24 GB or more: sizes are chosen from the free memory by the numbers of launch.plan.
After every part the results are written to runs/bench/gpu.json; a part's output is in runs/bench/gpu/PART.log.

--toy runs the same on a CPU at toy sizes, which shows that the benchmark works, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.environment import ROOT
from prune_distill.pipeline.artifact import write_json
from tests.benchmarks.gpu.figures import table
from tests.benchmarks.gpu.part import PARTS

# Shares of the time; what a part leaves over goes to those after it.
SHARES = {"loss": 3, "step": 7, "pipeline": 4, "resume": 3, "convert": 2, "fp8": 4}
# Seconds after its time at which a part that does not end by itself is killed.
GRACE = 20.0
# Environment variable that identifies the processes of a part, also those in sessions of their own.
MARK = "BENCH_GPU_PART"
TAIL = 3000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help="comma-separated; all by default")
    parser.add_argument("--seconds", type=float, default=1800, help="for all parts together")
    parser.add_argument("--toy", action="store_true", help="toy sizes, on a CPU too")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / "gpu.json")
    parser.add_argument("--work", type=Path, help="for models and runs, 60 GB; beside the results by default")
    args = parser.parse_args()
    out = args.out.absolute()
    folder = out.with_suffix("")
    work = (args.work or folder / "work").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": _machine(args.toy), "toy": args.toy, "parts": {}}
    print(json.dumps(result["machine"], indent=1), flush=True)
    until = time.monotonic() + args.seconds
    for number, part in enumerate(args.parts):
        later = sum(SHARES[name] for name in args.parts[number:])
        seconds = (until - time.monotonic()) * SHARES[part] / later
        print(f"\n{part}: at most {seconds:.0f} s", flush=True)
        result["parts"][part] = run_part(part, folder, work, seconds, args.toy)
        write_json(out, result)
    print(f"\n{summary(result)}\n{out}")
    return int(any(content["fault"] for content in result["parts"].values()))


def _parts(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: unknown; choose from {', '.join(PARTS)}")
    return names


def _machine(toy: bool) -> dict[str, Any]:
    """Return what `tests.benchmarks.gpu.machine` describes, from a process of its own: this one uses no GPU memory."""
    code = "import json; from tests.benchmarks.gpu import machine; print(json.dumps(machine.describe()))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-TAIL:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if not toy and "driver" not in found:
        sys.exit("error: no CUDA device; run it on a machine with one, or rehearse with --toy")
    return found


def run_part(part: str, folder: Path, work: Path, seconds: float, toy: bool) -> dict[str, Any]:
    """Run a part in a process; return its figures, its seconds, and what ended it early (None: nothing)."""
    items, log, mark = folder / f"{part}.json", folder / f"{part}.log", uuid.uuid4().hex
    items.unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.gpu.part", part, "--json", str(items)]
    command += ["--work", str(work), "--seconds", str(seconds), *(["--toy"] if toy else [])]
    started, fault = time.monotonic(), None
    with log.open("wb") as output:
        environment = {**os.environ, MARK: mark}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            process.wait(max(0.0, seconds) + GRACE)
            if process.returncode:
                fault = f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            fault = f"killed {GRACE:.0f} s after its time"
        finally:
            _kill(mark)
            process.wait()
    figures = json.loads(items.read_text()) if items.exists() else []
    if fault is not None:
        fault = f"{fault}\n{log.read_text(errors='replace')[-TAIL:]}"
    print(f"{table(figures)}\n{fault or ''}", flush=True)
    return {"seconds": round(time.monotonic() - started, 1), "fault": fault, "figures": figures}


def _kill(mark: str) -> None:
    """Kill what is left of a part: itself, launchers and stages."""
    variable = f"{MARK}={mark}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if variable in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)


def summary(result: dict[str, Any]) -> str:
    """All figures of all parts, as a table."""
    lines = [f"{result['machine']['card']}{' (toy sizes: these are no measurements)' if result['toy'] else ''}"]
    for part, content in result["parts"].items():
        state = f"failed: {content['fault'].splitlines()[0]}" if content["fault"] else "complete"
        lines.append(f"\n{part}: {state}, {content['seconds']:.0f} s\n{table(content['figures'])}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
