"""Files of documents as the data section names them: how they are packed, and the sources that they make up."""

from __future__ import annotations

import glob
import os
import re
import shlex
import stat
from collections.abc import Iterable, Iterator
from enum import Enum

from prune_distill.errors import ConfigError
from prune_distill.regular_files import HEAD_BYTES, starts_lfs_pointer
from prune_distill.schema import DataConfig, DataSource, DocumentFormat

# The fields of a record that may contain the document, by format, unless the config names another one.
KEYS = {
    DocumentFormat.text: ("text",),
    DocumentFormat.tokens: ("tokens",),
    DocumentFormat.chat: ("messages", "conversations"),
    DocumentFormat.ids: ("tokens",),
}
HUB = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<pattern>.+)")


class Packing(Enum):
    """How a file contains its records."""

    plain = "plain"
    gz = "gz"
    zst = "zst"
    parquet = "parquet"


_SUFFIXES = {
    **{f"{suffix}": Packing.plain for suffix in (".jsonl", ".ndjson", ".json")},
    **{f"{suffix}.gz": Packing.gz for suffix in (".jsonl", ".ndjson", ".json")},
    **{f"{suffix}.zst": Packing.zst for suffix in (".jsonl", ".ndjson", ".json")},
    ".parquet": Packing.parquet,
}
# The second form of zst is a skippable frame, which pzstd puts first (RFC 8878, 3.1.2).
_MAGIC = {
    Packing.gz: re.compile(rb"\x1f\x8b"),
    Packing.zst: re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    Packing.parquet: re.compile(rb"PAR1"),
}


def packing(path: str) -> Packing | None:
    """How a file is packed, by the end of its name; None if it cannot contain documents."""
    return next((kind for suffix, kind in _SUFFIXES.items() if path.endswith(suffix)), None)


def sources(data: DataConfig) -> dict[str, DataSource]:
    """The training sources by name: `data.sources`, or the one that `data.train` stands for."""
    if data.sources is not None:
        return data.sources
    return {"train": _unnamed_source(data, data.train, data.sample)}


def validation_source(data: DataConfig) -> DataSource:
    """The documents of `data.validation` as a source."""
    return _unnamed_source(data, data.validation)


def _unnamed_source(data: DataConfig, files: list[str] | None, sample: float = 1.0) -> DataSource:
    key = data.text_key if data.format is DocumentFormat.text else None
    return DataSource(files=files or [], format=data.format, key=key, sample=sample)


def document_fields(source: DataSource) -> tuple[str, ...]:
    """The fields of which each record of a source has one, with the document."""
    return (source.key,) if source.key else KEYS[source.format]


def find_existing(pattern: str) -> list[str]:
    """List the files or folders that a pattern names on this machine, in order of name.

    Whatever exists literally is taken literally, brackets and all; the rest of the pattern is a glob. Wildcards skip
    hidden names, and `**` follows links to folders.
    """
    literal, parts = _split_literal(os.path.expanduser(pattern))
    return sorted(set(_matches(literal, parts)))


def _split_literal(path: str) -> tuple[str, list[str]]:
    """Split a path into its longest part that exists and the components after it."""
    parts: list[str] = []
    while path and not os.path.lexists(path):
        parent, name = os.path.split(path.rstrip("/"))
        parts.insert(0, name)
        path = parent
    return path, parts


def _matches(folder: str, parts: list[str]) -> Iterator[str]:
    if "**" in parts:
        at = parts.index("**")
        for start in _matches(folder or os.curdir, parts[:at]):
            for below, _ in _walk(start):
                yield from _matches(below, parts[at + 1 :])
    elif parts:
        yield from glob.iglob(os.path.join(glob.escape(folder), *parts))
    else:
        yield folder


def files_below(folder: str) -> list[str]:
    """List all files below a folder, in order of name, without hidden files and those in hidden folders.

    Links to folders are followed; a folder that is reached twice (a link to its parent, for one) is listed once.

    Raises:
        ConfigError: a folder cannot be listed.
    """
    return sorted(os.path.join(below, name) for below, names in _walk(folder) for name in names)


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder from `folder` down with the names of its files, without hidden ones."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, NotADirectoryError):
            raise ConfigError(
                f"{error.filename}: cannot be listed ({error.strerror}); fix its permissions, or name other files"
            ) from error

    visited = {_file_id(folder)}
    for below, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        kept = []
        for name in sorted(folders):
            identity = _file_id(os.path.join(below, name))
            if not name.startswith(".") and identity not in visited:
                visited.add(identity)
                kept.append(name)
        folders[:] = kept
        yield below, [name for name in names if not name.startswith(".")]


def _file_id(path: str) -> tuple[int, int] | str:
    """A value that two paths to the same file share."""
    try:
        status = os.stat(path)
    except OSError:
        return path
    return status.st_dev, status.st_ino


def document_files(paths: Iterable[str]) -> list[str]:
    """Replace each folder by the files of documents in it; other paths stay as they are.

    A link to nothing is among them, whatever its name: it may stand for a folder of documents.
    """
    found: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            found += [file for file in files_below(path) if packing(file) or not os.path.exists(file)]
        else:
            found.append(path)
    return found


def drop_duplicates(files: Iterable[str]) -> list[str]:
    """Drop the files that an earlier path, or a link, already names."""
    first: dict[tuple[int, int] | str, str] = {}
    for file in files:
        first.setdefault(_file_id(file), file)
    return list(first.values())


def is_on_hub(pattern: str) -> bool:
    """Whether a pattern names files in a dataset on the Hub: hf://datasets/OWNER/NAME[@REVISION]/GLOB."""
    return pattern.startswith("hf://")


def unreadable(path: str) -> str | None:
    """Say why a local file cannot contain documents, from its name and its first bytes; None if it may.

    A compressed file of 0 bytes contains no documents, like a plain one.
    """
    kind = packing(path)
    try:
        status = os.stat(path)
        if kind is None:
            return f"has an unknown extension; name files that end in {', '.join(_SUFFIXES)}"
        if not stat.S_ISREG(status.st_mode):
            return "is a pipe, socket or device, not a regular file; write its content to a file"
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        return f"cannot be read ({error.strerror}); fix the link or the permissions, or remove it"
    if starts_lfs_pointer(head):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
    if kind is Packing.plain and head.lstrip().startswith(b"["):
        return f"contains a JSON array, not one object per line; convert it with: jq -c '.[]' {shlex.quote(path)}"
    magic = _MAGIC.get(kind)
    if magic is not None and not magic.match(head) and (head or kind is Packing.parquet):
        return f"is not a {kind.value} file, whatever its name says; rename it, or download it again"
    return None
