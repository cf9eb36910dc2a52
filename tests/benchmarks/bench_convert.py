"""python -m tests.benchmarks.bench_convert [--layers 24] [--rounds 3] [--nemo-rounds 1]

Compares both conversions of a random bf16 model of 3.2 B parameters with `cp` and fsync of its bytes, and with NeMo's
own importer: whole processes, imports included, interleaved; medians. Writes runs/bench/convert.json.
Needs about 30 GB of disk, and 20 GB of memory for NeMo's importer (--nemo-rounds 0 skips it).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from prune_distill.pipeline.artifact import write_json
from prune_distill.units import GIB

ROOT = Path(__file__).parents[2]
CONFIG = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,  # NeMo's importer assumes it
    "vocab_size": 151936,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nemo-rounds", type=int, default=1, help="of the rounds, how many run NeMo's importer")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        print(write_random_model(args.write, args.layers))
        return
    folder = ROOT / "runs" / "bench" / "convert"
    shutil.rmtree(folder, ignore_errors=True)
    hf, nemo, back, other = (folder / name for name in ("hf", "nemo", "back", "other"))
    # In a separate process: a new process counts the memory of its parent until it starts.
    write = [sys.executable, "-m", "tests.benchmarks.bench_convert", "--layers", str(args.layers), "--write", str(hf)]
    params = int(subprocess.run(write, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()[-1])
    print(f"{params / 1e9:.2f} B parameters, {size(hf) / 1e9:.2f} GB")

    module = [sys.executable, "-m"]
    runs = {
        "cp_hf": (["sh", "-c", f"cp -r {hf} {other} && sync {other}/*"], other),
        "import": ([*module, "convert.hf_to_nemo", "--hf-model", str(hf), "--out", str(nemo)], None),
        "cp_nemo": (["sh", "-c", f"cp -r {nemo}/weights {other} && sync {other}/*"], other),
        "export": ([*module, "convert.nemo_to_hf", "--checkpoint", str(nemo), "--out", str(back)], back),
        "nemo_import": ([*module, "tests.helpers.nemo_importer", str(hf), str(other)], other),
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    peak: dict[str, float] = defaultdict(float)
    for number in range(args.rounds):
        for name, (command, written) in runs.items():
            if name == "nemo_import" and number >= args.nemo_rounds:
                continue
            took, gigabytes = run(command)
            seconds[name].append(took)
            peak[name] = max(peak[name], gigabytes)
            print(f"round {number + 1} {name:12} {took:7.2f} s {gigabytes:6.2f} GB", flush=True)
            if name == "export" and number == 0:
                compare(hf, back)
            if written is not None:
                shutil.rmtree(written)
    shutil.rmtree(folder)

    result = {
        "model_params": params,
        "peak_rss_gb_import": round(peak["import"], 3),
        "peak_rss_gb_export": round(peak["export"], 3),
        "import_vs_cp": ratio(seconds, "import", "cp_hf"),
        "export_vs_cp": ratio(seconds, "export", "cp_nemo"),
        "import_speedup_vs_nemo": ratio(seconds, "nemo_import", "import") if args.nemo_rounds else None,
        "seconds": {name: [round(took, 2) for took in values] for name, values in seconds.items()},
        "peak_rss_gb_nemo_import": round(peak["nemo_import"], 3) if args.nemo_rounds else None,
    }
    write_json(folder.parent / "convert.json", result)
    print(json.dumps(result, indent=1))


def ratio(seconds: dict[str, list[float]], of: str, to: str) -> float:
    return round(median(seconds[of]) / median(seconds[to]), 2)


def run(command: list[str]) -> tuple[float, float]:
    """Run a process after a sync; return its seconds and peak resident memory in GB."""
    os.sync()
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    took = time.monotonic() - started
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{said.decode()[-3000:]}")
    return took, usage.ru_maxrss * 1024 / 1e9


def compare(first: Path, second: Path) -> None:
    """Stop the benchmark if a round trip changes tensors: a wrong copy is fast, too."""
    command = [sys.executable, "-m", "convert.verify", "--no-logits", str(first), str(second)]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    print(said.strip())


def write_random_model(folder: Path, layers: int, sizes: Mapping[str, int] = CONFIG) -> int:
    """Write a model with small random bf16 weights; return its number of parameters.

    Args:
        sizes: keys of `config.json`.
    """
    import numpy as np

    from prune_distill.model.hf_weights import expected_shapes
    from tests.helpers.models import write_model

    # Tokenizer and config of a tiny model, with other sizes.
    write_model("qwen3_untied_bf16", folder)
    config = json.loads((folder / "config.json").read_text()) | dict(sizes)
    config |= {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers, "max_window_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = expected_shapes(config)
    noise = np.random.default_rng(0).integers(0, 1 << 14, GIB // 16, dtype=np.uint16).tobytes()
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        count = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + count]}
        position += count
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        for start in range(0, position, len(noise)):
            file.write(noise[: position - start])
    return position // 2


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
