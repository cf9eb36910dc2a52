"""Checks of a model folder's tokenizer and side files before a run starts: no torch, no transformers.

What only transformers can tell is found where the tokenizer is loaded (`recipes/runtime/hf_tokenizer.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from conf.errors import InputError, reading

# Read as JSON objects by transformers, if they are there.
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
FETCH = "download the file again"
# The first line of a pointer (github.com/git-lfs/git-lfs/blob/main/docs/spec.md; the second host is of 2014).
_POINTER = re.compile(rb"version https://(git-lfs|hawser)\.github\.com/spec/v")
# A line of a vocabulary in tiktoken's format, which Llama 3 also calls tokenizer.model.
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


def faults(folder: Path) -> list[str]:
    """The faults of a local model folder's tokenizer and side files, one sentence each."""
    return [*_pointer_faults(folder), *_side_file_faults(folder), *_tokenizer_faults(folder)]


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer: the text that a clone without `git lfs pull` leaves in a file's place."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _POINTER.match(file.read(64)) is not None


def _pointer_faults(folder: Path) -> Iterator[str]:
    names = [path.name for path in sorted(folder.iterdir()) if is_lfs_pointer(path)]
    if names:
        yield (
            f"{folder}: {', '.join(names)} {'is a Git LFS pointer' if len(names) == 1 else 'are Git LFS pointers'}"
            " without the content; run `git lfs pull` there, or download the model again"
        )


def _side_file_faults(folder: Path) -> Iterator[str]:
    for path in (folder / name for name in SIDE_FILES):
        if path.exists() and not is_lfs_pointer(path):
            try:
                read_object(path)
            except InputError as fault:
                yield str(fault)


def read_object(path: Path) -> dict[str, object]:
    """The JSON object in a file.

    Raises:
        InputError: the file cannot be read or holds something else.
    """
    with reading(path, FETCH):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        return content


def _tokenizer_faults(folder: Path) -> Iterator[str]:
    """At most one fault: of the file that transformers would read."""
    described, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    if described.exists() or pieces.exists():
        path = described if described.exists() else pieces
        if not is_lfs_pointer(path):
            stat = path.stat()
            fault = _unreadable(path, stat.st_mtime_ns, stat.st_size)
            yield from [fault] if fault else []
    elif not ((folder / "vocab.json").exists() and (folder / "merges.txt").exists()):
        others = " (tekken.json alone cannot be used)" if (folder / "tekken.json").exists() else ""
        yield (
            f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model, nor vocab.json with merges.txt"
            f"{others}; add the tokenizer.json of this model"
        )


@lru_cache
def _unreadable(path: Path, mtime_ns: int, size: int) -> str | None:
    """Why a tokenizer file cannot be read; None: it can, or the library that reads it is not installed here.

    Args:
        mtime_ns, size: of the file; a file that changed is read again.
    """
    try:
        if path.suffix == ".json":
            from tokenizers import Tokenizer, __version__

            fix = f"{FETCH}, or save it with the installed version of tokenizers ({__version__})"
            with reading(path, fix):
                Tokenizer.from_file(str(path))
        else:
            from sentencepiece import SentencePieceProcessor

            with reading(path, FETCH), path.open("rb") as file:
                if not _TIKTOKEN.match(file.readline(4096)):
                    SentencePieceProcessor(model_proto=path.read_bytes())
    except ImportError:
        return None
    except InputError as fault:
        return str(fault)
    return None
