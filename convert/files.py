"""Folders that are written whole or not at all."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prune_distill.atomic_files import sync
from prune_distill.errors import InputError
from prune_distill.pipeline.artifact import remove_folder


@contextmanager
def replaced(folder: Path, *sources: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place once the block is through, everything synced to disk.

    What an earlier attempt left there is taken away. A block that fails leaves `folder` as it was.

    Args:
        sources: folders that are read meanwhile.

    Raises:
        InputError: what is in the place of `folder` is not to be replaced, or nothing can be written there.
    """
    folder = folder.resolve()
    _refuse(folder, sources)
    partial = folder.with_name(f".partial.{folder.name}")
    for left in (partial, folder.with_name(f".removed.{folder.name}")):
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"{folder} cannot be written ({error.strerror}); choose another place") from error
    try:
        yield partial
        for path in [partial, *partial.rglob("*")]:
            sync(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        remove_folder(folder)
    partial.rename(folder)
    sync(folder.parent)


def _refuse(folder: Path, sources: tuple[Path, ...]) -> None:
    for source in map(Path.resolve, sources):
        if source.is_relative_to(folder) or folder.is_relative_to(source):
            raise InputError(f"{folder} and its source {source} must not lie in each other; choose another place")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another place")
    models = ("config.json", "context/io.json")
    if folder.exists() and any(folder.iterdir()) and not any((folder / name).exists() for name in models):
        raise InputError(f"{folder} holds something else than a model, and would be replaced; choose another place")
