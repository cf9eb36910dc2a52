"""Both conversions of a random bf16 model, next to `cp` and fsync of the same bytes: GB/s of this machine's disk."""

from __future__ import annotations

import shutil
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

from tests.benchmarks import bench_convert
from tests.benchmarks.gpu.figures import Figures

LAYERS, ROUNDS = 12, 3
TOY = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 8, "vocab_size": 1024}


def measure(figures: Figures) -> None:
    folder = figures.work / "convert"
    shutil.rmtree(folder, ignore_errors=True)
    hf, nemo, back, other = (folder / name for name in ("hf", "nemo", "back", "other"))
    sizes = bench_convert.CONFIG | (TOY if figures.toy else {})
    params = bench_convert.write_random_model(hf, 2 if figures.toy else LAYERS, sizes)
    gigabytes = bench_convert.size(hf) / 1e9
    figures.add("convert/model", gigabytes, "GB", f"random bf16 weights, {params / 1e9:.2f} B parameters")
    module = [sys.executable, "-m"]
    commands: dict[str, tuple[list[str], Path | None]] = {
        "cp_hf": (["sh", "-c", f"cp -r {hf} {other} && sync {other}/*"], other),
        "import": ([*module, "convert.hf_to_nemo", "--hf-model", str(hf), "--out", str(nemo)], None),
        "cp_nemo": (["sh", "-c", f"cp -r {nemo}/weights {other} && sync {other}/*"], other),
        "export": ([*module, "convert.nemo_to_hf", "--checkpoint", str(nemo), "--out", str(back)], back),
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, float] = {}
    for number in range(1 if figures.toy else ROUNDS):
        if number and figures.left < 2 * sum(own[0] for own in seconds.values()):
            break
        for name, (command, written) in commands.items():
            took, peak = bench_convert.run(command)
            seconds[name].append(took)
            peaks[name] = max(peak, peaks.get(name, 0.0))
            if name == "export" and not number:
                bench_convert.compare(hf, back)
            if written is not None:
                shutil.rmtree(written)
    shutil.rmtree(folder)
    for name, own in seconds.items():
        how = f"median of {len(own)} interleaved rounds; the whole process with imports and fsync"
        figures.add(f"convert/{name}/speed", gigabytes / median(own), "GB/s", how)
        figures.add(f"convert/{name}/time", median(own), "s", how)
        figures.add(f"convert/{name}/peak_memory", peaks[name], "GB", "largest resident memory of the process")
    figures.add("convert/round_trip", "equal", "", "convert.verify, every tensor")
