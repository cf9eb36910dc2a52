"""One stage as processes on this machine: its command, its environment, its start and its end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from launch import torchrun
from launch.environment import ROOT, environment, nodes_and_ranks, stage_arguments
from recipes.artifact import Located

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# torchrun gives its workers 30 s to end before it kills them (torch/distributed/elastic/multiprocessing/api.py:1023).
SECONDS_TO_END = 40.0


def command(located: Located, resolved: Path) -> list[str]:
    """What starts a stage: torchrun where it has several ranks (for one it would add 5 s and nothing else)."""
    nodes, ranks = nodes_and_ranks(located)
    launcher, runner = [sys.executable, "-m"], torchrun.module(located.cfg.cluster)
    if nodes > 1:
        meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", str(located.cfg.cluster.rdzv_endpoint)]
        meet += ["--rdzv_id", f"{located.stage.name}-{located.config_hash[:8]}"]
        launcher += [*runner, "--nnodes", str(nodes), *meet, "--nproc_per_node", str(ranks), "-m"]
    elif ranks > 1:
        launcher += [*runner, "--standalone", "--nproc_per_node", str(ranks), "-m"]
    return [*launcher, *stage_arguments(located, resolved)]


def start(located: Located, resolved: Path, log: BinaryIO, keep_open: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Starts a stage in a process group of its own, both its outputs going to `log`.

    Args:
        located: the stage.
        resolved: the run's `resolved.yaml`.
        log: a file open for appending.
        keep_open: file descriptors that the process inherits (the run's lock, which so outlives the launcher).
    """
    return subprocess.Popen(
        command(located, resolved),
        env=_environment(located),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=keep_open,
        # Safe here: the launcher has one thread.
        preexec_fn=_end_with(os.getpid()) if sys.platform == "linux" else None,
    )


def _environment(located: Located) -> dict[str, str]:
    """The environment of a stage's processes: this one's, and what it lacks of `launch.environment`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env = {**environment(located), **os.environ}
    threads = located.cfg.cluster.threads_per_rank
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores // nodes_and_ranks(located)[1])))
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return env


def stop(process: subprocess.Popen[bytes], seconds: float = SECONDS_TO_END) -> None:
    """Ends a stage's processes: asked first, so that torchrun ends its workers, and killed after `seconds`."""
    for signum, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, None)):
        _signal_group(process, signum)
        try:
            process.wait(patience)
            break
        except subprocess.TimeoutExpired:
            continue
    # What the leader left behind in its group.
    _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[bytes], signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signum)


def _end_with(launcher: int) -> Callable[[], None]:
    """What a child does before it starts: have Linux end it when the launcher dies, however it dies."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:
            os._exit(1)

    return prepare
