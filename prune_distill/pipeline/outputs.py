"""Record the files of a complete folder by size and CRC-32, and compare them before the folder is read. No torch.

The record is a separate file, `outputs.json`, because a stage may write thousands of shards. The manifest contains the
CRC-32 of the record. Training checkpoints have records too, without a CRC-32.
"""

from __future__ import annotations

import fnmatch
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from isal import isal_zlib

from prune_distill.pipeline.names import CHECKPOINTS, MANIFEST, OUTPUTS, ROOM, STATE, STOP

# `{"size": bytes, "crc32": eight hex digits}` by path relative to the folder.
Entries = dict[str, dict[str, Any]]

# Files at the top of a stage's folder that describe the work and are not results. Checkpoints are for resuming and may
# be deleted at any time; each has its own record.
_NO_OUTPUTS = (MANIFEST, OUTPUTS, STATE, STOP, f"{STOP}.*", "began", "log*.txt", ROOM, CHECKPOINTS)
# At any depth: logs that services may rewrite later, a cache that only the stage itself reads, and claims on shards.
_NO_RESULTS = ("tensorboard", "wandb", "mlruns", "index_mapping", "claims")
# Torch's index of a distributed checkpoint; other hidden names are locks and partial files.
_HIDDEN_OUTPUT = ".metadata"
_READ_BYTES = 4 << 20
# CRC-32 is limited by memory bandwidth, so more threads do not help.
_MOST_THREADS = 8


def list_outputs(folder: Path, without: Iterable[str] = ()) -> list[str]:
    """List the results in a stage's folder by relative paths, sorted.

    Args:
        without: more names at the top of the folder to exclude.
    """
    left_out = (*_NO_OUTPUTS, *without)
    return sorted(name for name in list_files(folder) if not _matches(name.partition("/")[0], left_out))


def list_files(folder: Path) -> Iterator[str]:
    """Yield the files below a folder by relative paths, without hidden files, caches and files of trackers."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _NO_RESULTS]
        for name in files:
            if not name.startswith(".") or name == _HIDDEN_OUTPUT:
                yield (Path(root) / name).relative_to(folder).as_posix()


def digests(folder: Path, names: Iterable[str]) -> Entries:
    """Compute size and CRC-32 of files in a folder, with several threads. Raises: OSError."""
    return dict(_map(lambda name: (name, _digest(folder / name)), names))


def differences(folder: Path, entries: Mapping[str, Mapping[str, Any]], contents: bool = True) -> dict[str, str]:
    """Compare files with their record; return the faults by name.

    Args:
        contents: whether to read the files; otherwise only presence and sizes are compared.
    """
    found = {name: fault for name, entry in entries.items() if (fault := _size_fault(folder / name, entry["size"]))}
    if contents:
        faults = _map(lambda name: (name, _content_fault(folder / name, entries[name])), entries.keys() - found.keys())
        found |= {name: fault for name, fault in faults if fault}
    return dict(sorted(found.items()))


def select(entries: Entries, part: str = ".", patterns: Iterable[str] = ("*",)) -> Entries:
    """Select the entries at or below the path `part` whose names match a pattern (in which `*` also matches `/`)."""
    below = "" if part == "." else f"{part}/"
    return {
        name: entry
        for name, entry in entries.items()
        if (name == part or name.startswith(below)) and _matches(name, patterns)
    }


def select_share(entries: Entries, number: int, count: int) -> Entries:
    """Select the entries whose content one of `count` processes reads, balanced by bytes."""
    largest_first = sorted(entries.items(), key=lambda item: (-item[1]["size"], item[0]))
    return dict(largest_first[number::count])


def total_bytes(entries: Mapping[str, Mapping[str, Any]]) -> int:
    return sum(entry["size"] for entry in entries.values())


def parse_record(content: bytes) -> Entries | None:
    """Parse a record; None if it is invalid."""
    try:
        entries: Any = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entries, dict) or not all(_is_entry(name, entry) for name, entry in entries.items()):
        return None
    return entries


def compute_crc32(content: bytes) -> str:
    return f"{isal_zlib.crc32(content):08x}"


def _is_entry(name: str, entry: Any) -> bool:
    # A record may be damaged: its paths must not leave the folder.
    path = PurePosixPath(name)
    return (
        not path.is_absolute()
        and ".." not in path.parts
        and "\0" not in name
        and isinstance(entry, dict)
        and type(entry.get("size")) is int
        and isinstance(entry.get("crc32"), str)
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _size_fault(path: Path, size: int) -> str | None:
    try:
        status = path.stat()
    except OSError as error:
        return _unreadable(error)
    if not stat.S_ISREG(status.st_mode):
        return "is not a file"
    return None if status.st_size == size else f"has {status.st_size:,} bytes instead of {size:,}"


def _content_fault(path: Path, entry: Mapping[str, Any]) -> str | None:
    try:
        found = _digest(path)
    except OSError as error:
        return _unreadable(error)
    if found == entry:
        return None
    return f"has other content than was written (CRC-32 {found['crc32']} instead of {entry['crc32']})"


def _unreadable(error: OSError) -> str:
    missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
    return "is missing" if missing else f"cannot be read ({error.strerror})"


def _digest(path: Path) -> dict[str, Any]:
    size, crc = 0, 0
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(max(1, min(_READ_BYTES, os.fstat(file.fileno()).st_size))))
        while read := file.readinto(buffer):
            size, crc = size + read, isal_zlib.crc32(buffer[:read], crc)
    return {"size": size, "crc32": f"{crc:08x}"}


def _map(function: Any, names: Iterable[str]) -> list[Any]:
    """Map a function over names with threads: the CRC-32 of a block is computed without the GIL."""
    names = sorted(names)
    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, len(names))
    if threads < 2:
        return [function(name) for name in names]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, names))
