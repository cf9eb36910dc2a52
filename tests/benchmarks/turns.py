"""Programs timed in interleaved runs of a few seconds, so that all meet the same state of the machine."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median

import psutil


@dataclass(frozen=True)
class Runner:
    """A program that does one step after another.

    Attributes:
        start: starts it.
        seconds: of each step that it has done so far.
    """

    name: str
    start: Callable[[], subprocess.Popen[bytes]]
    seconds: Callable[[], Sequence[float]]


def take_turns(runners: Sequence[Runner], steps: int, warm_up: int, turn: float = 4.0) -> Iterator[dict[str, float]]:
    """Yield the median seconds a step of each runner, once a round, while all have steps to do.

    Args:
        steps: that each of them does in all.
        warm_up: steps that do not count.
        turn: seconds of a runner's turn; the step that began in the turn before does not count.
    """
    processes = {}
    try:
        for runner in runners:
            processes[runner.name] = runner.start()
            while len(runner.seconds()) < warm_up:
                if processes[runner.name].poll() is not None:
                    raise SystemExit(f"{runner.name} ended with {processes[runner.name].returncode}")
                time.sleep(0.1)
            _signal(processes[runner.name], stop=True)
        while True:
            medians = {}
            for runner in runners:
                before = len(runner.seconds())
                _signal(processes[runner.name], stop=False)
                time.sleep(turn)
                _signal(processes[runner.name], stop=True)
                done = runner.seconds()
                if len(done) >= steps or len(done) < before + 2:
                    return
                medians[runner.name] = median(done[before + 1 :])
            yield medians
    finally:
        for process in processes.values():
            _signal(process, stop=False)
            process.wait()


def _signal(process: subprocess.Popen[bytes], stop: bool) -> None:
    """To a process and all that it started: stages are in sessions of their own."""
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        for one in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.suspend() if stop else one.resume()
