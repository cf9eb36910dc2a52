"""Files that are replaced as a whole: a reader sees the old content or the new, never a part. No torch."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a hidden path next to `path` to write to; the file there becomes `path` when the block ends.

    Its content is on the disk before it does. An exception leaves `path` as it was, and nothing else.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replaces a file with a text in UTF-8. Its mode follows the umask."""
    with replace_file(path) as temporary, temporary.open("x", encoding="utf-8") as file:
        file.write(text)


def sync(path: Path) -> None:
    """Flushes a file's content, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
