"""python -m launch.guard STOP COMMAND...

Runs a stage's command as a Slurm task. When Slurm preempts a job it sends SIGTERM to every process of its steps, and
nothing to the job's script, some time before it kills them (its partition's GraceTime). torchrun and the data loader's
workers would die of it: it is blocked for the command, and becomes the stop file that the trainer looks for.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from prune_distill.pipeline.stage_log import exit_words

BLOCKED = {signal.SIGTERM, signal.SIGUSR1}


def main() -> int:
    """The command's exit status, 128 + N where signal N killed it; a failure is told in words for the log."""
    stop, *command = sys.argv[1:]

    def ask(signum: int, frame: FrameType | None) -> None:
        Path(stop).touch()

    for signum in BLOCKED:
        signal.signal(signum, ask)
    # Children inherit a blocked signal, whatever handlers they set.
    process = subprocess.Popen(command, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED))
    code = process.wait()
    if code != 0:
        print(exit_words(code), file=sys.stderr)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
