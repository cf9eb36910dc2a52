"""Checks of a model folder's tokenizer and side files before a run starts: no torch, no transformers.

Checks that need transformers are made when the tokenizer is loaded (`prune_distill/data/hf_tokenizer.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from prune_distill.errors import InputError, reading
from prune_distill.regular_files import is_lfs_pointer

# Files that are copied with a model unchanged: all except weights, code and documentation.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# Files that transformers reads as JSON objects.
OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
FETCH = "download the file again"
# A line of a vocabulary in tiktoken's format, which Llama 3 also calls tokenizer.model.
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


def faults(folder: Path) -> list[str]:
    """Return the faults of a local model folder's tokenizer and side files, one sentence each."""
    try:
        with reading(folder, "make its files readable"):
            return [*_pointer_faults(folder), *_object_faults(folder), *_tokenizer_faults(folder)]
    except InputError as fault:  # permissions
        return [str(fault)]


def has_chat_template(folder: Path) -> bool:
    """Return whether a folder contains a chat template, in one of the files where transformers looks for it."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    path = folder / "tokenizer_config.json"
    try:
        config = read_object(path) if path.is_file() else {}
    except InputError:  # a fault of its own
        return True
    return bool(config.get("chat_template")) or any(folder.glob("additional_chat_templates/*.jinja"))


def _pointer_faults(folder: Path) -> Iterator[str]:
    """Yield faults of Git LFS pointers among the files that are read. A clone may lack images and other weights."""
    weights = [path.name for path in folder.glob("*.safetensors*") if not path.name.startswith("consolidated")]
    names = [name for name in sorted({"config.json", *SIDE_FILES, *weights}) if is_lfs_pointer(folder / name)]
    if names:
        yield (
            f"{folder}: {', '.join(names)} {'is a Git LFS pointer' if len(names) == 1 else 'are Git LFS pointers'}"
            " without the content; run `git lfs pull` there, or download the model again"
        )


def _object_faults(folder: Path) -> Iterator[str]:
    for path in (folder / name for name in OBJECTS):
        if path.is_file() and not is_lfs_pointer(path):
            try:
                read_object(path)
            except InputError as fault:
                yield str(fault)


def read_object(path: Path) -> dict[str, object]:
    """Read the JSON object in a file.

    Raises:
        InputError: the file cannot be read, or contains something else.
    """
    with reading(path, FETCH):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        return content


def _tokenizer_faults(folder: Path) -> Iterator[str]:
    """Yield at most one fault, of the file that transformers would read."""
    described, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    if described.is_file() or pieces.is_file():
        path = described if described.is_file() else pieces
        if not is_lfs_pointer(path):
            stat = path.stat()
            fault = _unreadable(path, stat.st_mtime_ns, stat.st_size)
            yield from [fault] if fault else []
    elif not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        others = " (tekken.json alone cannot be used)" if (folder / "tekken.json").exists() else ""
        yield (
            f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model, nor vocab.json with merges.txt"
            f"{others}; add the tokenizer.json of this model"
        )


@lru_cache
def _unreadable(path: Path, mtime_ns: int, size: int) -> str | None:
    """Return why a tokenizer file cannot be read; None if it can, or its library is not installed.

    Args:
        mtime_ns, size: modification time and size; a changed file is read again.
    """
    try:
        if path.suffix == ".json":
            from tokenizers import Tokenizer, __version__  # only for files of this kind

            fix = f"{FETCH}, or save it with the installed version of tokenizers ({__version__})"
            with reading(path, fix):
                Tokenizer.from_file(str(path))
        else:
            from sentencepiece import SentencePieceProcessor  # only for files of this kind

            with reading(path, FETCH), path.open("rb") as file:
                if not _TIKTOKEN.match(file.readline(4096)):
                    SentencePieceProcessor(model_proto=path.read_bytes())
    except ImportError:
        return None
    except InputError as fault:
        return str(fault)
    return None


def ids_by_token(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Return the vocabulary of a parsed `tokenizer.json`, without added tokens.

    Unigram models list `[token, score]` pairs in the order of their ids; all others map tokens to ids.
    """
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {token: number for number, (token, _) in enumerate(vocabulary)}
