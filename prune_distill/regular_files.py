"""Check which files may be read: regular files with content, and links that stay inside a model's folder."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

# File types whose reading blocks or never ends.
_SPECIAL = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}
# The first line of a Git LFS pointer (github.com/git-lfs/git-lfs/blob/main/docs/spec.md; the second host was used in
# 2014).
_LFS_POINTER = re.compile(rb"version https://(git-lfs|hawser)\.github\.com/spec/v")
HEAD_BYTES = 64  # enough to recognize a pointer


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is a Git LFS pointer, which a clone has instead of the file before `git lfs pull`."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return starts_lfs_pointer(file.read(HEAD_BYTES))


def starts_lfs_pointer(head: bytes) -> bool:
    """Return whether the first `HEAD_BYTES` of a file belong to a Git LFS pointer."""
    return _LFS_POINTER.match(head) is not None


def folder_faults(folder: Path, *, allow_outside_links: bool = False) -> list[str]:
    """List the entries of a folder that must not be read, one sentence each. Hidden entries are skipped.

    FIFOs, sockets, devices, dangling links, and links to outside the folder are rejected. Links into the blobs of a Hub
    cache (`models--OWNER--NAME/blobs`), which the Hub client creates, are allowed.

    Args:
        allow_outside_links: for folders that may be spread over several disks, such as checkpoints.
    """
    root = folder.resolve()
    return [
        f"{path}: {reason}; replace it with a regular file, or delete it"
        for path in _entries(folder)
        if (reason := _fault(path, root, allow_outside_links)) is not None
    ]


def _entries(folder: Path) -> Iterator[Path]:
    """Yield all visible files and links below a folder, including links to folders."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        linked = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in sorted([*files, *linked]):
            if not name.startswith("."):
                yield Path(parent, name)


def _fault(path: Path, root: Path, allow_outside_links: bool) -> str | None:
    """Return why an entry must not be read, or None."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        return f"its target cannot be reached ({error.strerror if isinstance(error, OSError) else error})"
    if kind in _SPECIAL:
        return f"it is {_SPECIAL[kind]}, which cannot be read as part of a model"
    if not path.is_symlink() or allow_outside_links or target.is_relative_to(root) or _is_hub_blob(target):
        return None
    return f"it is a link to {target}, outside the model's folder"


def _is_hub_blob(path: Path) -> bool:
    return path.parent.name == "blobs" and path.parent.parent.name.startswith(("models--", "datasets--"))
