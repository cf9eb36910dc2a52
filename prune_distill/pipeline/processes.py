"""Control the processes of a stage: none outlives its parent, or inherits a foreign environment. No torch.

Python and the libraries start helpers in two ways. Forked helpers (data loader workers, the asynchronous checkpoint
writer of megatron/core/dist_checkpointing/strategies/async_utils.py:214 and its children) call a hook of `os`.
Spawned helpers (the workers of `prepare_data`, the manager of megatron/core/dist_checkpointing/strategies/
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

# Variables that make a process a rank of a job: torchrun sets these for its ranks
# (torch/distributed/elastic/agent/server/local_elastic_agent.py:413-430); Lightning reads NODE_RANK as well
# (lightning/fabric/plugins/environments/lightning.py). A shell may have inherited them from another job.
TORCHRUN_ID = "TORCHELASTIC_RUN_ID"
RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *(TORCHRUN_ID, "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE"),
    "TORCHELASTIC_ERROR_FILE",
)

# Variables of the training environment that must not reach the serving one. vLLM would read those of ranks.
_NOT_PASSED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", *RANK_VARIABLES)

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
SECONDS_BETWEEN_LOOKS = 0.5
# A socket's path has at most 107 bytes (sun_path in <linux/un.h>); multiprocessing adds 32 to the temporary folder
# (`/pymp-xxxxxxxx/listener-xxxxxxxx`, multiprocessing/connection.py:arbitrary_address).
LONGEST_TEMPORARY_FOLDER = 107 - 32
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_fork = threading.local()


def import_libraries(*modules: str) -> None:
    """Import modules without garbage collection, and exclude all existing objects from later collections.

    The collector scans a library's objects repeatedly while they are created, and once more when the
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
def exit_with_parent() -> None:
    """Make all forked children exit when this process exits for any reason.

    A child that multiprocessing spawned also makes itself exit with its parent.
    """
    os.register_at_fork(before=_record_parent, after_in_child=_follow_parent)
    if is_spawned() or parent_process() is not None:
        # The kernel's signal does not work here: it is sent when the *thread* that started the child ends.
        _start_watch(_is_parent_alive)


def is_spawned() -> bool:
    """Return whether multiprocessing spawned this process, even while it imports `__main__` and has no parent set.

    The checked argument is the last one in multiprocessing/spawn.py:get_command_line.
    """
    return sys.orig_argv[-1] == "--multiprocessing-fork"


def _is_parent_alive() -> bool:
    parent = parent_process()
    return parent is None or os.getppid() == parent.pid


def _record_parent() -> None:
    _fork.parent, _fork.by_main_thread = os.getpid(), threading.get_native_id() == os.getpid()


def _follow_parent() -> None:
    parent = _fork.parent
    if _libc is None or not _fork.by_main_thread:
        _start_watch(lambda: os.getppid() == parent)
        return
    set_parent_death_signal(signal.SIGKILL, parent)


def set_parent_death_signal(signum: int, parent: int | None = None) -> None:
    """Ask Linux to send this process a signal when its parent dies. Does nothing on other systems.

    Args:
        parent: pid of the parent; if it died before this call, this process is killed.
    """
    if _libc is None:
        return
    _libc.prctl(PR_SET_PDEATHSIG, signum)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _start_watch(parent_alive: Callable[[], bool]) -> None:
    """Start a thread that kills this process once its parent has ended."""

    def watch() -> None:
        while parent_alive():
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def exit_with_torchrun() -> None:
    """Ask Linux to kill this rank when its torchrun dies, so that no rank outlives a killed launcher."""
    set_parent_death_signal(signal.SIGKILL)


def remove_foreign_ranks(environment: dict[str, str] | os._Environ[str]) -> None:
    """Remove variables of another job's ranks, unless torchrun or srun started this process.

    Raises:
        InputError: the variables describe several ranks, for which this process would wait forever.
    """
    if TORCHRUN_ID in environment or _is_task_of_srun(environment):
        return
    found = [name for name in RANK_VARIABLES if name in environment]
    if environment.get("WORLD_SIZE", "1").strip() != "1":
        raise InputError(
            f"WORLD_SIZE={environment['WORLD_SIZE']}: set in the environment, but neither torchrun nor srun started"
            f" this process, which would wait forever for other ranks; run `unset {' '.join(found)}`, or start it"
            " with torchrun"
        )
    for name in found:
        del environment[name]


def _is_task_of_srun(environment: Mapping[str, str]) -> bool:
    """Return whether the variables are those of a task of a Slurm step (srun's names on the left)."""
    pairs = {"SLURM_NTASKS": "WORLD_SIZE", "SLURM_PROCID": "RANK"}
    return all(ours in environment and environment.get(srun) == environment[ours] for srun, ours in pairs.items())


def shorten_socket_paths() -> None:
    """Make multiprocessing use a folder with a short path for its sockets, here and in child processes.

    Other files stay in TMPDIR.

    Raises:
        InputError: TMPDIR is too long, and no short folder is writable.
    """
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) <= LONGEST_TEMPORARY_FOLDER:
        return
    short = next((place for place in SHORT_FOLDERS if Path(place).is_dir() and os.access(place, os.W_OK)), None)
    if short is None:
        raise InputError(
            f"TMPDIR={folder}: its path has more than {LONGEST_TEMPORARY_FOLDER} bytes, too long for the sockets of"
            f" Python's multiprocessing, and none of {', '.join(SHORT_FOLDERS)} is writable; set TMPDIR to a"
            " shorter path"
        )
    tempfile.tempdir = short
    try:
        # Once created, it is kept, and children inherit its name (multiprocessing/util.py:get_temp_dir).
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = folder


def require_python(python: Path) -> None:
    """Raises: InputError, if the Python of the serving environment does not exist."""
    if not python.exists():
        raise InputError(
            f"benchmark.serve_python={python}: does not exist; run make serve-env, or set it to a Python with vLLM"
        )


def serving_environment() -> dict[str, str]:
    """Return this process's variables without those of the training environment.

    A rank of torchrun passes on its own GPU alone.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED}
    if TORCHRUN_ID in os.environ:
        local_rank = int(os.environ["LOCAL_RANK"])
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = [] if visible is None else visible.split(",")
        own = gpus[local_rank] if local_rank < len(gpus) else visible
        environment["CUDA_VISIBLE_DEVICES"] = str(local_rank) if own is None else own
    return environment
