"""The processes of a stage: that none outlives its parent, and what they may take from the environment. No torch.

Python and the libraries start helpers in two ways. Forked ones (the data loader's workers, the asynchronous checkpoint
writer of megatron/core/dist_checkpointing/strategies/async_utils.py:214 and its own writers) pass a hook of `os`.
Spawned ones (the workers of `prepare_data`, the manager of megatron/core/dist_checkpointing/strategies/
filesystem_async.py:54) import the top level of `__main__`, the runner `recipes/__main__.py`, which imports
`prune_distill.pipeline.stage_main`.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import multiprocessing.util
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing import parent_process
from pathlib import Path

from prune_distill.errors import InputError

# What makes a process a rank of a job: torchrun sets these for its ranks
# (torch/distributed/elastic/agent/server/local_elastic_agent.py:413-430); Lightning reads NODE_RANK as well
# (lightning/fabric/plugins/environments/lightning.py). A shell may have them from another job.
TORCHRUN_ID = "TORCHELASTIC_RUN_ID"
RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *(TORCHRUN_ID, "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE"),
    "TORCHELASTIC_ERROR_FILE",
)

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
SECONDS_BETWEEN_LOOKS = 0.5
# A socket's path has at most 107 bytes (sun_path in <linux/un.h>); multiprocessing adds 32 to the temporary folder
# (`/pymp-xxxxxxxx/listener-xxxxxxxx`, multiprocessing/connection.py:arbitrary_address).
LONGEST_TEMPORARY_FOLDER = 107 - 32
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_fork = threading.local()


def import_libraries(*modules: str) -> None:
    """Imports modules with the garbage collector off, and excludes from later collections what exists by then.

    The collector goes through a library's objects again and again while they are created, and once more when the
    process ends: 3.5 of 12 s with NeMo, 0.6 of 3.7 s with transformers and lm_eval (medians, 2 cores).
    """
    gc.disable()
    try:
        for module in modules:
            importlib.import_module(module)
    finally:
        gc.freeze()
        gc.enable()


@cache
def end_with_parent() -> None:
    """Makes all children that this process forks end when it ends, however it ends.

    In a child that multiprocessing spawned, the child itself ends with its parent as well.
    """
    os.register_at_fork(before=_note_parent, after_in_child=_follow_parent)
    if is_spawned() or parent_process() is not None:
        # Not by the kernel's signal, which comes when the *thread* ends that started the child: which one is unknown.
        _start_watch(_spawned_alive)


def is_spawned() -> bool:
    """Whether multiprocessing spawned this process, also while it imports `__main__` and does not know its parent yet.

    The argument is what multiprocessing/spawn.py:get_command_line ends with.
    """
    return sys.orig_argv[-1] == "--multiprocessing-fork"


def _spawned_alive() -> bool:
    parent = parent_process()
    return parent is None or os.getppid() == parent.pid


def _note_parent() -> None:
    _fork.parent, _fork.by_main_thread = os.getpid(), threading.get_native_id() == os.getpid()


def _follow_parent() -> None:
    parent = _fork.parent
    if _libc is None or not _fork.by_main_thread:
        _start_watch(lambda: os.getppid() == parent)
        return
    signal_at_parents_death(signal.SIGKILL, parent)


def signal_at_parents_death(signum: int, parent: int | None = None) -> None:
    """Asks Linux to send this process a signal when its parent dies, however it dies. Does nothing on other systems.

    Args:
        parent: the process that is the parent; if it has died before this call, this process is killed.
    """
    if _libc is None:
        return
    _libc.prctl(PR_SET_PDEATHSIG, signum)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _start_watch(parent_alive: Callable[[], bool]) -> None:
    """Has a thread kill this process once its parent has ended, whose children then have another parent."""

    def watch() -> None:
        while parent_alive():
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def end_with_torchrun() -> None:
    """Asks Linux to kill this rank when the torchrun that started it dies: no rank outlives a killed launcher."""
    signal_at_parents_death(signal.SIGKILL)


def drop_foreign_ranks(environment: dict[str, str] | os._Environ[str]) -> None:
    """Removes what says that this process is a rank of another job, where neither torchrun nor srun started it.

    Raises:
        InputError: the variables say that there are several ranks; this one would wait for the others forever.
    """
    if TORCHRUN_ID in environment or _is_task_of_srun(environment):
        return
    found = [name for name in RANK_VARIABLES if name in environment]
    if environment.get("WORLD_SIZE", "1").strip() != "1":
        raise InputError(
            f"WORLD_SIZE={environment['WORLD_SIZE']} is in the environment, but neither torchrun nor srun started this"
            f" process, so it would wait for ranks that never come; run `unset {' '.join(found)}`, or start the stage"
            " by torchrun"
        )
    for name in found:
        del environment[name]


def _is_task_of_srun(environment: Mapping[str, str]) -> bool:
    """Whether the variables are those of a task of a Slurm step (srun's own names on the left)."""
    pairs = {"SLURM_NTASKS": "WORLD_SIZE", "SLURM_PROCID": "RANK"}
    return all(ours in environment and environment.get(srun) == environment[ours] for srun, ours in pairs.items())


def shorten_socket_paths() -> None:
    """Has multiprocessing put its sockets where their paths are short enough, here and in child processes.

    Everything else stays in TMPDIR.

    Raises:
        InputError: TMPDIR is too long, and there is no short folder to write to.
    """
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) <= LONGEST_TEMPORARY_FOLDER:
        return
    short = next((place for place in SHORT_FOLDERS if Path(place).is_dir() and os.access(place, os.W_OK)), None)
    if short is None:
        raise InputError(
            f"TMPDIR={folder}: its path has more than {LONGEST_TEMPORARY_FOLDER} bytes, too many for the sockets of"
            f" Python's multiprocessing, and none of {', '.join(SHORT_FOLDERS)} can be written to; set TMPDIR to a"
            " shorter path"
        )
    tempfile.tempdir = short
    try:
        # Made now, it is kept, and children inherit its name (multiprocessing/util.py:get_temp_dir).
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = folder
