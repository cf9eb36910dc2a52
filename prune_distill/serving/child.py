"""PYTHON -P child.py PID FILE
PYTHON -P child.py PID -m MODULE [ARGUMENTS]

Run a program in the serving environment, which ends with its parent, the process PID. vLLM's own processes outlive
their parent: an engine whose server is killed keeps running.

FILE is a worker. vLLM and its helpers print to the standard output, so this becomes the standard error, and the worker
gets the number of a file descriptor for its answers as its argument.

It runs in the serving environment, which has none of this repository's libraries.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

SECONDS_BETWEEN_LOOKS = 0.5


def main() -> None:
    parent = int(sys.argv[1])
    threading.Thread(target=_watch, args=(parent,), name="end-with-parent", daemon=True).start()
    program, *arguments = sys.argv[2:]
    if program == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [program, str(os.dup(1))]
        os.dup2(2, 1)
        runpy.run_path(program, run_name="__main__")


def _watch(parent: int) -> None:
    """Kill the processes of this session, which this process leads, once the parent has ended."""
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
