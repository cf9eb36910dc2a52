"""One stage as processes on this machine: its command, its environment, its start and its end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

from launch import torchrun
from launch.environment import ROOT, environment, nodes_and_ranks, stage_arguments
from prune_distill.pipeline.artifact import Located
from prune_distill.pipeline.processes import RANK_VARIABLES, signal_at_parents_death

# In the environment of everything that a stage starts: whose it is, also after its parents have ended.
MARK = "PRUNE_DISTILL_STAGE_PROCESS"
# torchrun takes these for its options (torch/distributed/argparse_util.py), which the launcher gives it itself; an
# operator of Kubernetes sets them for another job.
TORCHRUN_PLACEMENT = re.compile(r"PET_(NNODES|NODE_RANK|NPROC_PER_NODE|STANDALONE|LOCAL_ADDR|MASTER_\w+|RDZV_\w+)")
# torchrun gives its workers 30 s to end before it kills them (torch/distributed/elastic/multiprocessing/api.py:1023).
SECONDS_TO_END = 40.0
SECONDS_BETWEEN_LOOKS = 0.05
# Multiprocessing's resource tracker removes what a killed process left in /dev/shm.
SECONDS_TO_CLEAN_UP = 1.0


def command(located: Located, resolved: Path) -> list[str]:
    """What starts a stage: torchrun where it has several ranks (for one it would add 5 s and nothing else)."""
    nodes, ranks = nodes_and_ranks(located)
    launcher, runner = [sys.executable, "-m"], torchrun.module(located.cfg.cluster)
    if nodes > 1:
        meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", str(located.cfg.cluster.rdzv_endpoint)]
        meet += ["--rdzv_id", f"{located.stage.name}-{located.config_hash[:8]}"]
        launcher += [*runner, "--nnodes", str(nodes), *meet, "--nproc_per_node", str(ranks), "-m"]
    elif ranks > 1:
        # By default it is this machine's name, which may be in no DNS (torch/distributed/elastic/rendezvous/api.py:
        # RendezvousStoreInfo.build).
        launcher += [*runner, "--standalone", "--local_addr", "127.0.0.1", "--nproc_per_node", str(ranks), "-m"]
    return [*launcher, *stage_arguments(located, resolved)]


class StageProcess(subprocess.Popen[bytes]):
    """A stage's first process.

    Attributes:
        mark: the value of `MARK` in the environment of everything that it starts.
    """

    mark = ""


def start(located: Located, resolved: Path, log: BinaryIO, keep_open: Sequence[int] = ()) -> StageProcess:
    """Starts a stage in a process group of its own, both its outputs going to `log`.

    Args:
        located: the stage.
        resolved: the run's `resolved.yaml`.
        log: a file open for appending.
        keep_open: file descriptors that the process inherits (the run's lock, which so outlives the launcher).
    """
    env = _environment(located)
    process = StageProcess(
        command(located, resolved),
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=keep_open,
        # Safe here: the launcher has one thread.
        preexec_fn=partial(signal_at_parents_death, signal.SIGTERM, os.getpid()) if sys.platform == "linux" else None,
    )
    process.mark = env[MARK]
    return process


def _environment(located: Located) -> dict[str, str]:
    """The environment of a stage's processes: this one's, and what it lacks of `launch.environment`.

    Without what a shell may have of another job's ranks: a stage of one rank would wait for the others forever.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env = {**environment(located), **os.environ}
    for name in [name for name in env if name in RANK_VARIABLES or TORCHRUN_PLACEMENT.fullmatch(name)]:
        del env[name]
    threads = located.cfg.cluster.threads_per_rank
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores // nodes_and_ranks(located)[1])))
    env[MARK] = uuid.uuid4().hex
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return env


def stop(process: StageProcess, seconds: float = SECONDS_TO_END) -> None:
    """Ends a stage's processes: asked first, so that torchrun ends its workers, and killed after `seconds`.

    None is left when it returns: helpers, and the ranks of a torchrun that was killed, are in sessions of their own.
    """
    for signum, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, None)):
        _signal_group(process, signum)
        try:
            process.wait(patience)
            break
        except subprocess.TimeoutExpired:
            continue
    # What the leader left behind in its group.
    _signal_group(process, signal.SIGKILL)
    started = time.monotonic()
    # One that waits for a dead disk does not end.
    while (left := list(_marked(process.mark))) and (waited := time.monotonic() - started) < seconds:
        for pid in left if waited > SECONDS_TO_CLEAN_UP else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _marked(mark: str) -> Iterator[int]:
    """The running processes that have a mark in their environment; none on a system without /proc."""
    wanted = f"{MARK}={mark}".encode()
    for place in Path("/proc").glob("[0-9]*"):
        # Other users' cannot be read; of one that has ended and is not yet waited for, the environment is empty.
        with contextlib.suppress(OSError):
            if wanted in (place / "environ").read_bytes().split(b"\0"):
                yield int(place.name)


def _signal_group(process: StageProcess, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signum)
