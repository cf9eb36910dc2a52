"""Compute digests of the user's files, and cache them in the run's folder while size and times do not change.

A digest covers the whole content of a file. It is computed again if the size, modification time or change time of the
file differs from the cached one: a copied or touched file keeps its identity, an edited one gets a new identity. The
change time also reveals edits that restore the modification time. No torch, no NeMo.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from prune_distill.errors import ConfigError

# Cache file in a run's folder, shared by the launcher and the stages. Without it, all files are read again.
CACHE = ".inputs.json"
# Faster than any disk. SHA-256 and BLAKE2 reach 0.2 to 0.6 GB/s per core on processors without special instructions.
# The digest must reveal changes, but need not resist an adversary, who could also edit the run's folder.
ALGORITHM = "xxh3_128"
BLOCK_BYTES = 4 << 20
MOST_THREADS = 8
# A file that was written just before it is read may change again within one tick of the file system's clock.
SETTLED_NS = 2_000_000_000
SECONDS_BETWEEN_LINES = 10.0


class Record(NamedTuple):
    """A file's size in bytes, its modification and change time in ns, and the digest of its content."""

    size: int
    modified: int
    changed: int
    digest: str

    def holds_for(self, status: os.stat_result) -> bool:
        return self[:3] == (status.st_size, status.st_mtime_ns, status.st_ctime_ns)


# Records of this process by absolute path. Real paths may differ inside a container.
_records: dict[str, Record] = {}


def digests(files: Iterable[Path]) -> list[str]:
    """Return the digests of regular files, in order. Digests that are not cached are computed in parallel.

    Raises:
        ConfigError: a file cannot be read, or is a pipe, socket or device.
    """
    paths = [os.path.abspath(file) for file in files]
    statuses = {path: _status(path) for path in paths}
    found = {
        path: _records[path].digest for path in paths if path in _records and _records[path].holds_for(statuses[path])
    }
    missing = {path: status for path, status in statuses.items() if path not in found}
    if missing:
        found |= _compute(missing)
    return [found[path] for path in paths]


def load_cache(run_dir: Path) -> None:
    """Read the cache of a run's folder. A damaged file is ignored."""
    for path, record in _stored(run_dir).items():
        _records.setdefault(path, record)


def build_cache(run_dir: Path) -> dict[str, Any] | None:
    """Return the updated content of the run folder's cache; None if it is already up to date."""
    stored = _stored(run_dir)
    files = {**stored, **_records}
    if files == stored:
        return None
    return {"algorithm": ALGORITHM, "checksum": _checksum(files), "files": files}


def _stored(run_dir: Path) -> dict[str, Record]:
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        content = json.loads((run_dir / CACHE).read_bytes())
        if content["algorithm"] == ALGORITHM and content["checksum"] == _checksum(content["files"]):
            return {path: Record(*values) for path, values in content["files"].items()}
    return {}


def _checksum(files: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())


def _status(path: str) -> os.stat_result:
    try:
        status = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path} is a pipe, socket or device, not a regular file; write its content to a file")
    return status


def _unreadable(path: str, error: OSError) -> ConfigError:
    return ConfigError(f"{path} cannot be read ({error.strerror}); repair the link or the permissions, or remove it")


def _compute(missing: Mapping[str, os.stat_result]) -> dict[str, str]:
    reading = _Reading(sum(status.st_size for status in missing.values()))
    began = time.time_ns()
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1, len(missing))) as pool:
        futures = {path: pool.submit(reading.digest, path) for path in missing}
        try:
            while wait(futures.values(), timeout=1).not_done:
                reading.report()
        except BaseException:
            reading.canceled.set()
            pool.shutdown(cancel_futures=True)
            raise
    for path, before in missing.items():
        record = Record(before.st_size, before.st_mtime_ns, before.st_ctime_ns, futures[path].result())
        settled = max(before.st_mtime_ns, before.st_ctime_ns) < began - SETTLED_NS
        if settled and record.holds_for(_status(path)):
            _records[path] = record
    return {path: future.result() for path, future in futures.items()}


class _Reading:
    """Progress of reading files, and whether to stop."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.started = self.reported = time.monotonic()
        self.canceled = threading.Event()
        self.lock = threading.Lock()

    def digest(self, path: str) -> str:
        hasher, block = xxhash.xxh3_128(), memoryview(bytearray(BLOCK_BYTES))
        try:
            with open(path, "rb", buffering=0) as file:
                while (count := file.readinto(block)) and not self.canceled.is_set():
                    hasher.update(block[:count])
                    with self.lock:
                        self.done += count
        except OSError as error:
            raise _unreadable(path, error) from error
        return hasher.hexdigest()

    def report(self) -> None:
        """Print the progress from time to time, on one of a stage's ranks."""
        now = time.monotonic()
        if now - self.reported < SECONDS_BETWEEN_LINES or os.environ.get("RANK", "0") != "0":
            return
        self.reported = now
        rate = self.done / (now - self.started)
        print(
            f"reading new and changed inputs: {self.done / 1e9:,.1f} of {self.total / 1e9:,.1f} GB,"
            f" {rate / 1e9:.2f} GB/s, {(self.total - self.done) / max(rate, 1) / 60:,.1f} min left",
            file=sys.stderr,
            flush=True,
        )
