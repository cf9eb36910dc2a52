"""A worker: a program of the serving environment that answers lines of JSON, one by one; see `child`."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

from prune_distill.serving import processes


class Worker:
    """A worker's process. Use it as a context manager, or call `close`.

    Args:
        program: its file.
        python: Python of the serving environment.
        variables: environment variables for those that the user has not set.

    Raises:
        InputError: there is no such Python.
    """

    def __init__(self, program: Path, python: Path, variables: dict[str, str]) -> None:
        self._process = processes.start(
            python, [program], variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, content: dict[str, Any]) -> dict[str, Any]:
        """Send a line, and return its answer. Raises: RuntimeError, if the process ended; its output says why."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"vLLM ended with status {self._process.wait()}; its messages are above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process, which ends with its input unless it is busy."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(processes.SECONDS_TO_END)
        processes.end(self._process)
        self._process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
