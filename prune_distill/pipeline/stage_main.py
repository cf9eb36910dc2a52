"""How every stage starts and ends, in the process that the runner (`recipes/__main__.py`) or torchrun started for it.

Exit status: 0 with a manifest, or with a state file that says "paused"; 2 for what the user can fix (one `error:`
line); 1 with a traceback for the rest.
No NeMo and no torch here: the runner imports this module at the top, and a process that saves a checkpoint spawns a
helper which imports `__main__` again (with NeMo that cost 15 to 30 s per process; see the use of `multiprocessing` in
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
from prune_distill.pipeline.integrity import damaged_inputs, find_damage, list_inputs, refuse, unrecorded
from prune_distill.pipeline.processes import (
    TORCHRUN_ID,
    drop_foreign_ranks,
    end_with_parent,
    end_with_torchrun,
    is_spawned,
    shorten_socket_paths,
)
from prune_distill.pipeline.run_arguments import StageModule, fill_inputs, view_config
from prune_distill.pipeline.stage import Stage
from prune_distill.pipeline.stages import STAGES

log = logging.getLogger("recipes.stage")


# How a full disk shows. The error is wrapped by then in whatever the writer raises, sometimes only quoted. Of a write
# that fell short, torch's zip writer only names its source file (caffe2/serialize/inline_container.cc), and numpy only
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
    """A stage was asked to pause, and saved what it had: it ends well, but is not complete."""


# Twice the default lease of an NFS server (90 s, nfsd(7)).
SECONDS_FOR_A_LOST_NODE = 180.0


def stage_main(name: str, config: Path, load: Callable[[Stage], StageModule]) -> None:
    """Runs one stage of a resolved config and declares its folder complete.

    Args:
        name: the stage's name in the stage table.
        config: the run's `resolved.yaml`.
        load: imports what the stage needs and returns its module. Called once the inputs are checked. The module's
            `run` is called on every rank; its metrics are those of rank 0.
    """
    if TORCHRUN_ID in os.environ:
        end_with_torchrun()
    else:
        # Inside a Slurm job Lightning would take this one rank for one of Slurm's tasks, except in a job of this name
        # (lightning/fabric/plugins/environments/slurm.py:103).
        os.environ["SLURM_JOB_NAME"] = "interactive"
    stay_guarded()
    with command_line():
        located = _ready(config, name)
        if located.complete:
            log.info("%s is complete in %s", name, located.folder)
            return
        started = time.time()
        located.folder.mkdir(parents=True, exist_ok=True)
        with _only_one(located):
            if rank() == 0 and located.complete:  # not just returned from: the other ranks have started
                raise InputError(f"{name} was completed in {located.folder} by the process that held its lock")
            try:
                module = load(located.stage)
                inputs = fill_inputs(module.Inputs, located.inputs)
                metrics = module.run(view_config(located.cfg, located.stage), inputs, located.folder)
            except PausedError as paused:
                log.info("%s", paused)
                return
            # Of several processes that share a stage's work, one declares it.
            if rank() == 0 and not located.complete:
                write_manifest(located, started, time.time(), metrics, peak_memory())
        gc.freeze()  # or the interpreter goes through all that was imported once more before it ends, which takes 2 s


def _only_one(located: Located) -> AbstractContextManager[Any]:
    """The lock on a stage's folder, held by the first rank: two starts of a stage would write over each other's files.

    A stage whose work several processes may share has its own way to share it (`Stage.shares_work`). A holder on
    another host may be the node that a Slurm job was requeued from: NFS keeps a lost node's locks for its lease.
    """
    if rank() > 0 or located.stage.shares_work:
        return nullcontext()
    return lock.held(located.folder, f"stage {located.stage.name}", "end it", SECONDS_FOR_A_LOST_NODE)


@contextmanager
def command_line() -> Iterator[None]:
    """What every command of the stages does: it logs to standard error, keeps its helpers and its environment in order
    (`prune_distill.pipeline.processes`), and turns what the user can fix into one `error:` line and exit status 2."""
    _log_to_stderr()
    end_with_parent()
    try:
        drop_foreign_ranks(os.environ)
        shorten_socket_paths()
        yield
    except (ConfigError, InputError) as fault:
        sys.exit(_fail(str(fault)))
    except BaseException:  # torch's CheckpointException is no Exception
        found = [line for line in traceback.format_exc().splitlines() if _DISK_FULL.search(line)]
        if not found:
            raise
        message = f"no space left ({found[-1].strip()}); nothing that was complete is lost: free some and run again"
        sys.exit(_fail(message))


class _Redacting(logging.Formatter):
    """Removes credentials from messages and tracebacks: libraries quote the URLs and headers that failed."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python prints of an error that nothing catches, without credentials."""
    print(redact("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="", flush=True)


def _log_to_stderr() -> None:
    """Our own messages from INFO on, the libraries' from WARNING on (NeMo's own logger does as it likes)."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Redacting("%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    sys.excepthook = _print_redacted
    for package in ("prune_distill", "recipes", "convert"):
        logging.getLogger(package).setLevel(logging.INFO)


def _ready(config: Path, stage: str) -> Located:
    """The stage's place in the run, once everything that it reads is known to be what was written.

    Ranks share the reading: one that finds damage ends the stage for all of them.
    """
    known = [row.name for row in STAGES]
    if stage not in known:
        raise InputError(f"there is no stage {stage!r}; the stages are {', '.join(known)}")
    if not config.is_file():
        raise ConfigError(f"--config {config} does not exist; give a run folder's resolved.yaml")
    everything = locate(load_resolved(config))
    if stage not in everything:
        raise ConfigError(f"this run has no stage {stage!r}; it has {', '.join(everything)}")
    located = everything[stage]
    if located.complete:
        damage = find_damage(located.folder, contents=False)
        refuse([damage] if damage else [], config.parent)
        return located
    needed = list_inputs(located, everything)
    faults = [
        f"{made.stage.name}, an input of {stage}, is not complete in {made.folder}; run that stage first"
        for made in needed
        if not made.complete
    ]
    if faults:
        raise ConfigError(faults)
    if notice := unrecorded(needed):
        log.warning("%s", notice)
    refuse(damaged_inputs(located, everything, located.cfg.verify_inputs, (rank(), world_size())), config.parent)
    return located


def peak_memory() -> dict[str, int | None]:
    """The most bytes that this process held: of the machine, and, where it used a GPU, of that."""
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
    """This process's global rank: 0 where nothing distributed is running."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of ranks that torchrun started: 1 where it didn't."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def stay_guarded() -> None:
    """Where `launch.guard` keeps SIGTERM from this process, leaves it so, in its children too, and sees that they end.

    Multiprocessing takes the block away when it first needs its resource tracker, at the first checkpoint
    (multiprocessing/resource_tracker.py:151). And it ends daemonic children, such as the data loader's workers, with
    SIGTERM and waits for them (multiprocessing/util.py:_exit_function): for ever, where that is blocked.
    """
    if signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, []):
        return

    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def kill() -> None:
        # torch's handler would raise for every one (torch/utils/data/_utils/signal_handling.py).
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in active_children():
            child.kill()

    # After the import of multiprocessing.util, which registers its own: the last one registered is called first.
    atexit.register(kill)


if is_spawned():  # a helper of a stage, which imports `__main__` again and so this module
    end_with_parent()
