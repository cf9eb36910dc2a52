"""Hold checkpoints of a running training, which may delete them at any moment.

Hard links hold them: they need neither time nor space, and remain when the training deletes its own links. This module
has few imports, so that it starts at once, and works while the measuring process loads and computes.
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
def holding(checkpoints: Path, folder: Path, seconds: float) -> Iterator[None]:
    """Hold in `folder` every checkpoint that appears during the block, in a separate process.

    The process looks for checkpoints at once, every `seconds`, and a last time at the end. It is forked: enter the
    block before the process has state that must not be forked, such as threads.
    """
    fork = multiprocessing.get_context("fork")
    reader, writer = fork.Pipe(duplex=False)
    process = fork.Process(target=_keep_holding, args=(checkpoints, folder, seconds, reader, writer))
    process.start()
    reader.close()
    try:
        yield
    finally:
        writer.close()
        process.join()


def _keep_holding(checkpoints: Path, folder: Path, seconds: float, reader: Connection, writer: Connection) -> None:
    # The parent handles Ctrl-C. The pipe closes when the parent ends, even if it is killed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    writer.close()
    seen: set[int] = set()
    log.info("watching %s", checkpoints)
    ended = False
    while True:
        for step in hold(checkpoints, folder, seen):
            log.info("step %d: held", step)
        if ended:
            return
        ended = reader.poll(seconds)


def hold(checkpoints: Path, folder: Path, seen: set[int]) -> list[int]:
    """Link new checkpoints to `folder`, add their steps to `seen`, and return them.

    A checkpoint that is deleted in the meantime is skipped.
    """
    held = []
    for step, checkpoint in find_checkpoints(checkpoints).items():
        target = folder / checkpoint.name
        if step not in seen and not target.exists() and _link(checkpoint, target):
            held.append(step)
    seen.update(held)
    return held


def _link(source: Path, target: Path) -> bool:
    """Link a folder under another name, atomically; return whether that succeeded."""
    partial = target.with_name(f".{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        names = sorted(path.relative_to(source) for path in source.rglob("*"))
        for name in names:
            if (source / name).is_dir():
                (partial / name).mkdir(exist_ok=True)
            else:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(source / name, partial / name)
        # A folder that is renamed while it is read appears to have fewer files.
        if not names or not source.exists():
            raise FileNotFoundError(source)
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
