"""python -m tests.benchmarks.gpu.part NAME --json FILE --work DIR --seconds N [--toy]: measure one part.

`tests.benchmarks.bench_gpu` starts it. A part is a module of this folder with a function `measure(figures)`.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from tests.benchmarks.gpu.figures import Figures

PARTS = {
    "loss": "tests.benchmarks.gpu.loss",
    "step": "tests.benchmarks.gpu.step",
    "pipeline": "tests.benchmarks.gpu.pipeline",
    "resume": "tests.benchmarks.gpu.resume",
    "convert": "tests.benchmarks.gpu.convert",
    "fp8": "tests.benchmarks.gpu.fp8",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    figures = Figures(args.json, args.work, args.seconds, args.toy)
    importlib.import_module(PARTS[args.name]).measure(figures)


if __name__ == "__main__":
    main()
