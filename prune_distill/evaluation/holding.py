"""Holds checkpoints of a running training, which may delete them at any moment.

Hard links hold them: they take neither time nor space, and stay when the training deletes its own names. This module
imports little, so that it starts at once, and works while the process that measures them loads and computes.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from prune_distill.pipeline.names import find_checkpoints

log = logging.getLogger("recipes.recovery")

# In the folder of the stage evaluate: held checkpoints, and models exported from them.


@contextmanager
def holding(checkpoints: Path, pen: Path, seconds: float) -> Iterator[None]:
    """Holds in `pen` every checkpoint that appears inside the block, in a process of its own.

    That process looks for checkpoints at once, every `seconds`, and a last time at the end. It is forked: enter the
    block before there is anything that must not be forked.
    """
    fork = multiprocessing.get_context("fork")
    reader, writer = fork.Pipe(duplex=False)
    process = fork.Process(target=_keep_holding, args=(checkpoints, pen, seconds, reader, writer))
    process.start()
    reader.close()
    try:
        yield
    finally:
        writer.close()
        process.join()


def _keep_holding(checkpoints: Path, pen: Path, seconds: float, reader: Connection, writer: Connection) -> None:
    # Ctrl-C ends the parent. The pipe shows that the parent ended, also if it was killed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    writer.close()
    seen: set[int] = set()
    log.info("watching %s", checkpoints)
    ended = False
    while True:
        for step in hold(checkpoints, pen, seen):
            log.info("step %d: held", step)
        if ended:
            return
        ended = reader.poll(seconds)


def hold(checkpoints: Path, pen: Path, seen: set[int]) -> list[int]:
    """Links to `pen` the checkpoints whose steps are not in `seen`, adds them to it, and returns the linked steps.

    A checkpoint that is deleted meanwhile is skipped.
    """
    held = []
    for step, checkpoint in find_checkpoints(checkpoints).items():
        target = pen / checkpoint.name
        if step not in seen and not target.exists() and _link(checkpoint, target):
            held.append(step)
    seen.update(held)
    return held


def _link(folder: Path, target: Path) -> bool:
    """Links a folder under another name, all at once; returns whether that succeeded."""
    partial = target.with_name(f".{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        names = sorted(path.relative_to(folder) for path in folder.rglob("*"))
        for name in names:
            if (folder / name).is_dir():
                (partial / name).mkdir(exist_ok=True)
            else:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(folder / name, partial / name)
        # A folder that was renamed while it was read looks as if it had fewer files.
        if not names or not folder.exists():
            raise FileNotFoundError(folder)
        os.replace(partial, target)
    except FileNotFoundError:
        shutil.rmtree(partial, ignore_errors=True)
        return False
    return True


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
