"""python -m launch.guard STOP COMMAND...

Run a stage's command as a Slurm task. When Slurm preempts a job, it sends SIGTERM to every process of its steps, but
not to the job's script, some time before it kills them (the partition's GraceTime). torchrun and data loader workers
would exit: the signal is blocked for the command, and creates the stop file that the trainer checks for.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from prune_distill.pipeline.stage_log import describe_exit

BLOCKED = {signal.SIGTERM, signal.SIGUSR1}


def main() -> int:
    """Return the command's exit status, or 128 + N if signal N killed it; describe failures for the log."""
    stop, *command = sys.argv[1:]

    def request_stop(signum: int, frame: FrameType | None) -> None:
        Path(stop).touch()

    for signum in BLOCKED:
        signal.signal(signum, request_stop)
    # Children inherit blocked signals, regardless of their handlers.
    process = subprocess.Popen(command, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED))
    code = process.wait()
    if code != 0:
        print(describe_exit(code), file=sys.stderr)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
