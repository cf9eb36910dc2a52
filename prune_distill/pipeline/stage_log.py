"""Parse a stage's log and metrics: its starts, its progress, and why it failed. No torch."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

LINES = 30
# torchrun's report on a worker, which it repeats in a traceback.
_WORKER_DIED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
_TORCHRUN = re.compile(r"^[WE]\d{4} .*torch/distributed/(run|elastic)")
_FAULT = re.compile(r"^(?:\[\w+\]:?\s*)?error: (.*)")
_ATTEMPT = re.compile(rb"^--- \d{4}-\d\d-\d\d .*\n", re.MULTILINE)
_BEGAN = re.compile(rb"--- (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}) (.*)")
_NOISE = re.compile(
    r"Warning: |warnings\.warn\(|^\s*$|^\*{5,}$|^Setting OMP_NUM_THREADS"
    # srun's report on its tasks, and its warning that it cannot bind cores, which is not requested.
    r"|^srun: (launch/slurm: |Terminating |Job step aborted|cluster configuration lacks support for cpu binding)"
    r"|^srun: error: \S+: tasks? [\d,-]+: (Exited|Killed|Terminated)"
)


@dataclass(frozen=True)
class Reason:
    """Why a stage failed.

    Attributes:
        fault: message of `stage_main` for an error that the user can fix; None for other errors.
        death: the rank that died and why, if torchrun reports it.
        lines: the last informative lines.
    """

    fault: str | None
    death: str | None
    lines: list[str]


@dataclass(frozen=True)
class Attempt:
    """One start of a stage: seconds since the epoch, and the rest of its line in the log (command or Slurm job)."""

    started: float
    words: str


def parse_object(line: str) -> dict[str, Any] | None:
    """Parse a line as a JSON object; None if it is truncated, incomplete, or something else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def parse_metrics(line: str) -> dict[str, Any] | None:
    """Parse a line of `metrics.jsonl`: the numbers of a step, by name; None if it is something else."""
    values = parse_object(line)
    if values is None or type(values.get("step")) is not int or values["step"] < 0:
        return None
    return values if all(value is None or _is_number(value) for value in values.values()) else None


def _is_number(value: Any) -> bool:
    # Python reads integers of any length, which may not fit in a float.
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)


def read_attempts(log: Path) -> list[Attempt]:
    """Read every start of a stage, in order; none if there is no log."""
    try:
        with log.open("rb") as file:
            found = [_BEGAN.match(line) for line in file if line.startswith(b"--- ")]
    except OSError:
        return []
    return [
        Attempt(
            datetime.strptime(line[1].decode(), "%Y-%m-%d %H:%M:%S %z").timestamp(), line[2].decode(errors="replace")
        )
        for line in found
        if line is not None
    ]


def read_reason(log: Path, start: int) -> Reason:
    """Find the reason of a failure in the log from byte `start` on."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    deaths = [(index, found) for index, line in enumerate(lines) if (found := _WORKER_DIED.search(line))]
    before_death = lines[: deaths[0][0]] if deaths else lines
    informative = [line for line in before_death if not _NOISE.search(line) and not _TORCHRUN.match(line)]
    return Reason(_fault(lines), _death(deaths[0][1]) if deaths else None, informative[-LINES:])


def last_attempt(log: Path) -> int:
    """Return the position in a stage's log after the line (`--- ` and a date) that begins its last attempt."""
    content = log.read_bytes()
    starts = [found.end() for found in _ATTEMPT.finditer(content)]
    return starts[-1] if starts else 0


def describe_exit(code: int) -> str:
    """Describe an exit code."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    # SIGBUS: a page of a mapped file does not fit on the disk, or is beyond the end of the file.
    why = {"SIGKILL": " (out of memory?)", "SIGBUS": " (a full disk, or a truncated file?)"}
    return f"killed by {name}{why.get(name, '')}"


def _death(found: re.Match[str]) -> str:
    return f"rank {found.group(2)}: {describe_exit(int(found.group(1)))}"


def _fault(lines: list[str]) -> str | None:
    """Return the first `error:` line and the indented lines below it."""
    for index, line in enumerate(lines):
        found = _FAULT.match(line)
        if found:
            below = []
            for following in lines[index + 1 :]:
                if not following.startswith("  "):
                    break
                below.append(following)
            return "\n".join([found.group(1), *below])
    return None
