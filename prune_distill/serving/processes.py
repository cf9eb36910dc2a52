"""Start and end programs of the serving environment. None outlives the process that starts it, even a killed one."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

from prune_distill.pipeline.processes import require_python, serving_environment

CHILD = Path(__file__).with_name("child.py")
SECONDS_TO_END = 20


def start(python: Path, program: Sequence[str | Path], variables: Mapping[str, str], **pipes: Any) -> Popen[Any]:
    """Start a program in a session of its own.

    Args:
        python: Python of the serving environment.
        program: a file, or `-m` and a module; then its arguments.
        variables: environment variables for those that the user has not set.
        pipes: further arguments of `subprocess.Popen`.

    Raises:
        InputError: there is no such Python.
    """
    require_python(python)
    command = [python, "-P", CHILD, str(os.getpid()), *program]
    return Popen(command, env={**variables, **serving_environment()}, start_new_session=True, **pipes)


def end(process: Popen[Any]) -> None:
    """End a program with its helpers: all processes of its session."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
            process.wait(SECONDS_TO_END)
        except ProcessLookupError:
            break
        except TimeoutExpired:
            continue
    process.wait()
