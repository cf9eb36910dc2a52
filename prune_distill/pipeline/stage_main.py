"""Start and end of every stage, in the process that the runner (`recipes/__main__.py`) or torchrun started.

Exit status: 0 with a manifest, or with a state file that contains "paused"; 2 for errors that the user can fix (one
`error:` line); 1 with a traceback for others.
This module imports neither NeMo nor torch: the runner imports it at the top, and a process that saves a checkpoint
spawns a helper which imports `__main__` again (with NeMo that took 15 to 30 s; see the use of `multiprocessing` in
torch/distributed/checkpoint and in Megatron).
"""

from __future__ import annotations

import atexit
import errno
import gc
import logging
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing import active_children, resource_tracker
from pathlib import Path
from types import TracebackType
from typing import Any

from prune_distill.config.load import load_resolved
from prune_distill.credentials import redact
from prune_distill.errors import ConfigError, InputError
from prune_distill.pipeline import lock
from prune_distill.pipeline.artifact import Located, locate, write_manifest
from prune_distill.pipeline.integrity import (
    damaged_inputs,
    describe_unrecorded,
    find_damage,
    list_inputs,
    raise_if_damaged,
)
from prune_distill.pipeline.processes import (
    TORCHRUN_ID,
    exit_with_parent,
    exit_with_torchrun,
    is_spawned,
    remove_foreign_ranks,
    shorten_socket_paths,
)
from prune_distill.pipeline.run_arguments import StageModule, fill_inputs, view_config
from prune_distill.pipeline.stage import Stage
from prune_distill.pipeline.stages import STAGES

log = logging.getLogger("recipes.stage")


# Messages of a full disk. The writer's exception may wrap or only quote the error. After an incomplete
# write, torch's zip writer only names its source file (caffe2/serialize/inline_container.cc), and numpy only
# counts the items (numpy/core/src/multiarray/convert.c:PyArray_ToFile).
_DISK_FULL = re.compile(
    "|".join(
        [
            *map(re.escape, (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "inline_container.cc")),
            r"\d+ requested and \d+ written",
        ]
    )
)


class PausedError(Exception):
    """A stage was asked to pause and has saved its state. It ends without an error, but is not complete."""


# Twice the default lease of an NFS server (90 s, nfsd(7)).
SECONDS_FOR_A_LOST_NODE = 180.0


def stage_main(name: str, config: Path, load: Callable[[Stage], StageModule]) -> None:
    """Run one stage of a resolved config and declare its folder complete.

    Args:
        name: the stage's name in the stage table.
        config: the run's `resolved.yaml`.
        load: imports and returns the stage's module. Called after the inputs are checked. The module's
            `run` is called on every rank; the metrics of rank 0 are used.
    """
    if TORCHRUN_ID in os.environ:
        exit_with_torchrun()
    else:
        # Inside a Slurm job, Lightning would treat this single rank as a Slurm task, except in a job of this name
        # (lightning/fabric/plugins/environments/slurm.py:103).
        os.environ["SLURM_JOB_NAME"] = "interactive"
    keep_signals_blocked()
    with command_line():
        located = _locate_checked(config, name)
        if located.complete:
            log.info("%s is complete in %s", name, located.folder)
            return
        started = time.time()
        located.folder.mkdir(parents=True, exist_ok=True)
        with _lock_stage(located):
            if rank() == 0 and located.complete:  # raise instead of returning, because other ranks have started
                raise InputError(f"{name} was completed in {located.folder} by the process that held its lock")
            try:
                module = load(located.stage)
                inputs = fill_inputs(module.Inputs, located.inputs)
                metrics = module.run(view_config(located.cfg, located.stage), inputs, located.folder)
            except PausedError as paused:
                log.info("%s", paused)
                return
            # If several processes share a stage's work, one of them declares it complete.
            if rank() == 0 and not located.complete:
                write_manifest(located, started, time.time(), metrics, peak_memory())
        gc.freeze()  # otherwise the interpreter scans all imported objects once more at exit, which takes 2 s


def _lock_stage(located: Located) -> AbstractContextManager[Any]:
    """Hold the lock on a stage's folder, on the first rank: two starts of a stage would overwrite each other's files.

    A stage whose work several processes may share coordinates them itself (`Stage.shares_work`). A holder on
    another host may be the previous node of a requeued Slurm job: NFS keeps the locks of a lost node for its lease.
    """
    if rank() > 0 or located.stage.shares_work:
        return nullcontext()
    return lock.hold_lock(located.folder, f"stage {located.stage.name}", "end it", SECONDS_FOR_A_LOST_NODE)


@contextmanager
def command_line() -> Iterator[None]:
    """Common behavior of all commands: log to stderr, control helper processes and the environment
    (`prune_distill.pipeline.processes`), and print errors that the user can fix as one `error:` line (exit status 2).
    """
    _log_to_stderr()
    exit_with_parent()
    try:
        remove_foreign_ranks(os.environ)
        shorten_socket_paths()
        yield
    except (ConfigError, InputError) as fault:
        sys.exit(_fail(str(fault)))
    except BaseException:  # torch's CheckpointException is not an Exception
        found = [line for line in traceback.format_exc().splitlines() if _DISK_FULL.search(line)]
        if not found:
            raise
        message = f"no space left ({found[-1].strip()}); free some space and run again: complete results are kept"
        sys.exit(_fail(message))


class _Redacting(logging.Formatter):
    """Removes credentials from messages and tracebacks: libraries quote URLs and headers of failed requests."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught error as Python does, without credentials."""
    print(redact("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="", flush=True)


def _log_to_stderr() -> None:
    """Log our own messages from INFO on, those of libraries from WARNING on. NeMo's logger has its own settings."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Redacting("%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    sys.excepthook = _print_redacted
    for package in ("prune_distill", "recipes", "convert"):
        logging.getLogger(package).setLevel(logging.INFO)


def _locate_checked(config: Path, stage: str) -> Located:
    """Locate the stage, after checking that all its inputs are intact.

    Ranks share the reading. If one of them finds damage, the stage ends on all ranks.
    """
    known = [row.name for row in STAGES]
    if stage not in known:
        raise InputError(f"there is no stage {stage!r}; use one of {', '.join(known)}")
    if not config.is_file():
        raise ConfigError(f"--config={config}: no such file; give the resolved.yaml of a run folder")
    everything = locate(load_resolved(config))
    if stage not in everything:
        raise ConfigError(f"this run has no stage {stage!r}; use one of {', '.join(everything)}")
    located = everything[stage]
    if located.complete:
        damage = find_damage(located.folder, contents=False)
        raise_if_damaged([damage] if damage else [], config.parent)
        return located
    needed = list_inputs(located, everything)
    faults = [
        f"{made.stage.name}, an input of {stage}, is not complete in {made.folder}; run that stage first"
        for made in needed
        if not made.complete
    ]
    if faults:
        raise ConfigError(faults)
    if notice := describe_unrecorded(needed):
        log.warning("%s", notice)
    raise_if_damaged(
        damaged_inputs(located, everything, located.cfg.verify_inputs, (rank(), world_size())), config.parent
    )
    return located


def peak_memory() -> dict[str, int | None]:
    """Return the peak memory of this process in bytes: host memory and, if it used a GPU, GPU memory."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_initialized()
    return {
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "gpu_bytes": torch.cuda.max_memory_reserved() if torch is not None and on_gpu else None,
    }


def _fail(message: str) -> int:
    print(f"error: {redact(message)}", file=sys.stderr, flush=True)
    return 2


def rank() -> int:
    """Return the global rank of this process: 0 if it is not distributed."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of ranks that torchrun started: 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def keep_signals_blocked() -> None:
    """If `launch.guard` blocks SIGTERM, keep it blocked in this process and its children, and make sure that they end.

    Multiprocessing unblocks it when it starts its resource tracker, at the first checkpoint
    (multiprocessing/resource_tracker.py:151). It also terminates daemonic children, such as data loader workers, with
    SIGTERM and waits for them (multiprocessing/util.py:_exit_function): forever, if it is blocked.
    """
    if signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, []):
        return

    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def kill() -> None:
        # torch's handler would raise for each of them (torch/utils/data/_utils/signal_handling.py).
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in active_children():
            child.kill()

    # After the import of multiprocessing.util, which registers its own function: the last one is called first.
    atexit.register(kill)


if is_spawned():  # a helper of a stage imports `__main__` and thus this module
    exit_with_parent()
