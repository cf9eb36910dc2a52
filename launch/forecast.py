"""python -m launch.forecast RUN_DIR... [--tokens N ...] [--target LOSS] [--first FRACTION | --until-step N] [--json]

Where a loss will go, from the curve that it has so far: that of a distillation that still runs or has ended, or those
of the candidates of successive halving. Without --tokens and --target, the loss at the end of the training. Beyond its
end, the loss of a longer training whose schedule is stretched. docs/planning.md says what the intervals mean and how
often they held.

Exit status: 0, or 2 where a run has no curve, or none that can be continued: too short, too flat, not finite.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.planning.forecast import Forecast, forecast, to_json, to_text
from launch.planning.recorded import RecordedCurve, read_curves
from prune_distill.errors import ConfigError, InputError
from prune_distill.pipeline.artifact import find_runs


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = _read_arguments(arguments)
    forecasts: list[Forecast] = []
    faults: list[str] = []
    run_dirs: list[Path] = []
    for folder in args.run_dirs:
        try:
            run_dirs += find_runs(folder)
        except InputError as error:
            faults.append(f"error: {error}")
    for run_dir in run_dirs:
        try:
            for curve in read_curves(run_dir, args.stage, args.metric):
                try:
                    forecasts.append(forecast(curve, args.tokens, args.target, _last_step(args, curve)))
                except InputError as error:  # the next candidate may have a longer curve
                    faults.append(f"error: {error}")
        except (ConfigError, InputError, OSError) as error:
            faults.append(f"error: {error}" if not isinstance(error, ConfigError) else str(error))
    if args.json:
        print(json.dumps(to_json(forecasts), indent=1))
    elif forecasts:
        print("\n\n".join(map(to_text, forecasts)))
    print(*faults, sep="\n", end="\n" if faults else "", file=sys.stderr)
    return 2 if faults else 0


def _last_step(args: argparse.Namespace, curve: RecordedCurve) -> float:
    """The last step whose points are fitted."""
    if args.first is not None:
        return float(args.first * curve.steps[-1])
    return math.inf if args.until_step is None else float(args.until_step)


def _read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.forecast", description=(__doc__ or "").partition("\n")[2].strip()
    )
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="folders of runs, or of sweeps")
    parser.add_argument("--stage", default="distill", help="the stage that trains (default: distill)")
    parser.add_argument("--metric", default="val_loss", help="which loss of metrics.jsonl (default: val_loss)")
    parser.add_argument("--tokens", type=_count, nargs="+", default=[], metavar="N", help="predict the loss there")
    parser.add_argument("--target", type=_loss, metavar="LOSS", help="predict the tokens to this loss")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--first", type=_fraction, metavar="FRACTION", help="fit only the first steps of those recorded")
    part.add_argument("--until-step", type=_count, metavar="N", help="fit only the points up to this step")
    parser.add_argument("--json", action="store_true", help="print JSON: a list with an object per curve")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    """A number such as 160, 2e9 or 1_000."""
    value = _loss(text)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number")
    return int(value)


def _loss(text: str) -> float:
    value = _number(text)
    if not value > 0 or math.isinf(value):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _fraction(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a fraction above 0 and at most 1")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not a number") from error


if __name__ == "__main__":
    sys.exit(main())
