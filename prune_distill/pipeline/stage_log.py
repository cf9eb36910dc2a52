"""What a stage's log and its metrics tell: when it was started, how far it is, and why it failed. No torch."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

LINES = 30
# torchrun's report on its worker, after which it only repeats itself in a traceback of its own.
_WORKER_DIED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
_TORCHRUN = re.compile(r"^[WE]\d{4} .*torch/distributed/(run|elastic)")
_FAULT = re.compile(r"^(?:\[\w+\]:?\s*)?error: (.*)")
_ATTEMPT = re.compile(rb"^--- \d{4}-\d\d-\d\d .*\n", re.MULTILINE)
_BEGAN = re.compile(rb"--- (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}) (.*)")
_NOISE = re.compile(
    r"Warning: |warnings\.warn\(|^\s*$|^\*{5,}$|^Setting OMP_NUM_THREADS"
    # srun's echo of how its tasks ended, and what it says where it cannot bind cores, which it is asked not to do.
    r"|^srun: (launch/slurm: |Terminating |Job step aborted|cluster configuration lacks support for cpu binding)"
    r"|^srun: error: \S+: tasks? [\d,-]+: (Exited|Killed|Terminated)"
)


@dataclass(frozen=True)
class Reason:
    """Why a stage failed.

    Attributes:
        fault: the message that `stage_main` prints for what the user can fix; None for anything else.
        death: which rank died of what, where torchrun says so.
        lines: the last lines that say something.
    """

    fault: str | None
    death: str | None
    lines: list[str]


@dataclass(frozen=True)
class Attempt:
    """One start of a stage: seconds since the epoch, and what its log's line says beside (command, or Slurm job)."""

    started: float
    words: str


def parse_object(line: str) -> dict[str, Any] | None:
    """The JSON object of a line; None where the line is cut by a kill, still being written, or something else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def parse_metrics(line: str) -> dict[str, Any] | None:
    """A line of `metrics.jsonl`: the numbers of a step, by name; None where the line is something else."""
    values = parse_object(line)
    if values is None or type(values.get("step")) is not int or values["step"] < 0:
        return None
    return values if all(value is None or _is_number(value) for value in values.values()) else None


def _is_number(value: Any) -> bool:
    # Python reads integers of any length, which no float can hold.
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)


def attempts(log: Path) -> list[Attempt]:
    """Every start of a stage, in order; none where there is no log."""
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
    """The reason in the part of a log from byte `start` on."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    deaths = [(index, found) for index, line in enumerate(lines) if (found := _WORKER_DIED.search(line))]
    said = lines[: deaths[0][0]] if deaths else lines
    telling = [line for line in said if not _NOISE.search(line) and not _TORCHRUN.match(line)]
    return Reason(_fault(lines), _death(deaths[0][1]) if deaths else None, telling[-LINES:])


def last_attempt(log: Path) -> int:
    """The byte of a stage's log after the line of `--- ` and a date with which its last attempt begins."""
    content = log.read_bytes()
    starts = [found.end() for found in _ATTEMPT.finditer(content)]
    return starts[-1] if starts else 0


def exit_words(code: int) -> str:
    """An exit code for people."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    # A page of a mapped file that the disk has no room for, or that lies beyond the file's end, is a SIGBUS.
    why = {"SIGKILL": " (out of memory?)", "SIGBUS": " (a full disk, or a file that was cut short?)"}
    return f"killed by {name}{why.get(name, '')}"


def _death(found: re.Match[str]) -> str:
    return f"rank {found.group(2)}: {exit_words(int(found.group(1)))}"


def _fault(lines: list[str]) -> str | None:
    """The first `error:` line and the indented ones below it."""
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
