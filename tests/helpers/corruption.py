"""Damage every kind of file in a complete run, in every way, and undo it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from prune_distill.pipeline.artifact import Located
from prune_distill.pipeline.integrity import damaged_inputs, read_record
from prune_distill.pipeline.outputs import Entries, select
from prune_distill.pipeline.stage import Output


def flip(path: Path) -> None:
    """Flip a bit in the middle."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def hole(path: Path) -> None:
    """Zero 4 KiB in the middle, like a lost block of a disk; if they are zeros already, write other bytes."""
    with path.open("r+b") as file:
        file.seek(max(0, path.stat().st_size // 2 - 2048))
        content = file.read(4096)
        file.seek(-len(content), os.SEEK_CUR)
        file.write(bytes(len(content)) if any(content) else b"\1" * len(content))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\1")


def delete(path: Path) -> None:
    path.unlink()


DAMAGES: tuple[Callable[[Path], None], ...] = (flip, hole, truncate, lengthen, delete)


@contextmanager
def damage_file(path: Path, damage: Callable[[Path], None], aside: Path) -> Iterator[None]:
    """Damage a file during the block, with the same time stamps."""
    shutil.copy2(path, aside)
    times = path.stat()
    try:
        damage(path)
        if path.exists():
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        yield
    finally:
        shutil.copy2(aside, path)


@contextmanager
def swap_files(one: Path, other: Path, aside: Path) -> Iterator[None]:
    """Swap two files during the block."""

    def swap() -> None:
        one.rename(aside)
        other.rename(one)
        aside.rename(other)

    swap()
    try:
        yield
    finally:
        swap()


def classify(name: str) -> str:
    """Return the kind of a file: its name without numbers and hashes."""
    return re.sub(r"[0-9a-f]{8,}(-[0-9a-f]{4,})*|\d+", "N", name)


def examples(entries: Entries) -> dict[str, str]:
    """Return one non-empty file of each kind, by kind."""
    return {classify(name): name for name, entry in entries.items() if entry["size"]}


def find_silent_uses(
    stages: Mapping[str, Located], aside: Path, made_by: Collection[str] | None = None
) -> tuple[int, list[str]]:
    """Damage every kind of file that a stage reads from a complete one, in every way.

    Args:
        made_by: stages whose files are damaged; None: all complete stages.

    Returns:
        The number of cases, and those in which the stage would have started nevertheless.
    """
    tried, silent, seen = 0, [], set()
    complete = {name for name, stage in stages.items() if stage.complete and (made_by is None or name in made_by)}
    for located in stages.values():
        for source in located.stage.inputs(located.cfg).values():
            # Check each input once, even if several stages read it.
            if not isinstance(source, Output) or source in seen or source.stage not in complete:
                continue
            seen.add(source)
            folder = stages[source.stage].folder
            entries = select(read_record(folder).entries or {}, source.path, source.files)
            for name in [*examples(entries).values(), "manifest.json", "outputs.json"]:
                for damage in DAMAGES:
                    # Without a readable manifest a folder is incomplete, which is another error.
                    with damage_file(folder / name, damage, aside):
                        tried += 1
                        if stages[source.stage].complete and not damaged_inputs(located, stages, contents=True):
                            silent.append(f"{located.stage.name} reads {folder.name}/{name} after {damage.__name__}")
            for one, other in _of_same_size(folder, entries):
                with swap_files(folder / one, folder / other, aside):
                    tried += 1
                    if not damaged_inputs(located, stages, contents=True):
                        silent.append(f"{located.stage.name} reads {folder.name}/{one} in place of {other}")
    return tried, silent


def _of_same_size(folder: Path, entries: Entries) -> Iterator[tuple[str, str]]:
    """Yield pairs of files that only differ in content."""
    by_size: dict[int, str] = {}
    for name, entry in entries.items():
        other = by_size.setdefault(entry["size"], name)
        if entries[other]["crc32"] != entry["crc32"]:
            yield name, other
