"""Run one stage as processes on this machine: build its command and environment, start and stop it."""

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
from prune_distill.pipeline.processes import RANK_VARIABLES, set_parent_death_signal

# Environment variable that identifies all processes of a stage, even after their parents have ended.
MARK = "PRUNE_DISTILL_STAGE_PROCESS"
# torchrun reads these as defaults of its options (torch/distributed/argparse_util.py), which the launcher sets itself;
# a Kubernetes operator sets them for another job.
TORCHRUN_PLACEMENT = re.compile(r"PET_(NNODES|NODE_RANK|NPROC_PER_NODE|STANDALONE|LOCAL_ADDR|MASTER_\w+|RDZV_\w+)")
# torchrun kills its workers after 30 s (torch/distributed/elastic/multiprocessing/api.py:1023).
SECONDS_TO_END = 40.0
SECONDS_BETWEEN_LOOKS = 0.05
# Multiprocessing's resource tracker removes the leftovers of a killed process in /dev/shm.
SECONDS_TO_CLEAN_UP = 1.0


def command(located: Located, resolved: Path) -> list[str]:
    """Return the command of a stage, with torchrun for several ranks (for one it would only add 5 s)."""
    nodes, ranks = nodes_and_ranks(located)
    launcher, runner = [sys.executable, "-m"], torchrun.module(located.cfg.cluster)
    if nodes > 1:
        meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", str(located.cfg.cluster.rdzv_endpoint)]
        meet += ["--rdzv_id", f"{located.stage.name}-{located.config_hash[:8]}"]
        launcher += [*runner, "--nnodes", str(nodes), *meet, "--nproc_per_node", str(ranks), "-m"]
    elif ranks > 1:
        # The default is the host name, which DNS may not resolve (torch/distributed/elastic/rendezvous/api.py:
        # RendezvousStoreInfo.build).
        launcher += [*runner, "--standalone", "--local_addr", "127.0.0.1", "--nproc_per_node", str(ranks), "-m"]
    return [*launcher, *stage_arguments(located, resolved)]


class StageProcess(subprocess.Popen[bytes]):
    """A stage's first process.

    Attributes:
        mark: the value of `MARK` in the environment of all its descendants.
    """

    mark = ""


def start(located: Located, resolved: Path, log: BinaryIO, keep_open: Sequence[int] = ()) -> StageProcess:
    """Start a stage in a new process group, with stdout and stderr redirected to `log`.

    Args:
        located: the stage.
        resolved: the run's `resolved.yaml`.
        log: a file open for appending.
        keep_open: file descriptors that the process inherits (the run's lock, which it holds if the launcher dies).
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
        preexec_fn=partial(set_parent_death_signal, signal.SIGTERM, os.getpid()) if sys.platform == "linux" else None,
    )
    process.mark = env[MARK]
    return process


def _environment(located: Located) -> dict[str, str]:
    """Return the environment of a stage's processes: that of this process, with defaults from `launch.environment`.

    Variables of another job's ranks are removed: a stage with one rank would wait for the others forever.
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
    """Stop a stage's processes: terminate them, so that torchrun stops its workers, and kill them after `seconds`.

    This includes helpers, and the ranks of a killed torchrun, which have their own sessions.
    """
    for signum, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, None)):
        _signal_group(process, signum)
        try:
            process.wait(patience)
            break
        except subprocess.TimeoutExpired:
            continue
    # The rest of the process group.
    _signal_group(process, signal.SIGKILL)
    started = time.monotonic()
    # Processes that wait for a dead disk do not end.
    while (running := list(_find_marked(process.mark))) and (waited := time.monotonic() - started) < seconds:
        for pid in running if waited > SECONDS_TO_CLEAN_UP else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _find_marked(mark: str) -> Iterator[int]:
    """Yield the pids of running processes with a mark in their environment; none on a system without /proc."""
    variable = f"{MARK}={mark}".encode()
    for place in Path("/proc").glob("[0-9]*"):
        # Processes of other users are not readable; zombies have an empty environment.
        with contextlib.suppress(OSError):
            if variable in (place / "environ").read_bytes().split(b"\0"):
                yield int(place.name)


def _signal_group(process: StageProcess, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signum)
