"""Verify a prepared data folder against the checksums and counts that were recorded when it was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from prune_distill.data.shards import SPLITS, Index, read_manifest
from prune_distill.data.tokenizer import transformers_tokenizer
from prune_distill.errors import InputError
from prune_distill.pipeline.names import DATA, SHARDS

READ_BYTES = 4 << 20
DOCUMENTS = 1 << 16
# Maximum number of faults in a message.
MAX_FAULTS = 20


def check_folder(folder: Path) -> str:
    """Verify a folder and summarize it in a sentence.

    Raises:
        InputError: the folder is incomplete, or a file has changed.
    """
    content = _content(folder)
    faults = list(_faults(folder, content))
    if faults:
        more = f", and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
        raise InputError(f"{folder}: {'; '.join(faults[:MAX_FAULTS])}{more}; remove the folder and prepare it again")
    train, validation = content["train"], content["validation"]
    return (
        f"{folder}: {sum(part['documents'] for part in train):,} training documents of"
        f" {sum(part['tokens'] for part in train):,} tokens in {len(train)} parts, {validation['documents']:,}"
        f" validation documents of {validation['tokens']:,} tokens; nothing has changed"
    )


def document_text(folder: Path, split: str, number: int) -> str:
    """Return a document as text, with a line that says where it is. Raises: InputError, if it does not exist."""
    content = _content(folder)
    parts = content["train"] if split == "train" else [{"prefix": "validation", **content["validation"]}]
    before = 0
    for part in parts:
        if 0 <= number - before < part["documents"]:
            prefix = folder / part["prefix"]
            index = Index.read(Path(f"{prefix}.idx"))
            tokens = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r")
            start = index.pointers[number - before] // index.dtype.itemsize
            ids = tokens[start : start + index.lengths[number - before]].tolist()
            text = transformers_tokenizer(content["tokenizer"]).decode(ids, skip_special_tokens=False)
            return f"# {split} document {number}: number {number - before} of {prefix}, {len(ids)} tokens\n{text}"
        before += part["documents"]
    raise InputError(f"{folder} has no {split} document {number}; choose one from 0 to {before - 1}")


def _content(folder: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((folder / DATA).read_text())
    except FileNotFoundError:
        raise InputError(f"{folder} has no data.json: it is not a prepared folder, or incomplete") from None
    return content


def _faults(folder: Path, content: dict[str, Any]) -> Iterator[str]:
    for shard in sorted((folder / SHARDS).iterdir()):
        if shard.name.startswith("."):
            yield f"{shard.name} is a leftover of a killed process"
            continue
        manifest = read_manifest(shard)
        for split in SPLITS:
            yield from _split_faults(shard / split, manifest[split], content)
        lines = manifest["lines"]
        if lines["lines"] != sum(lines[kind] for kind in ("documents", "empty", "bad", "left_out")):
            yield f"{shard.name} has a wrong count of lines"
    yield from _split_faults(folder / "validation", content["validation"], content)
    for part in content["train"]:
        try:
            index = Index.read(folder / f"{part['prefix']}.idx")
        except (OSError, ValueError) as error:
            yield str(error)
            continue
        if (len(index.lengths), int(index.lengths.sum(dtype=np.int64))) != (part["documents"], part["tokens"]):
            yield f"{part['prefix']} does not match data.json"


def _split_faults(prefix: Path, recorded: dict[str, Any], content: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a `.bin/.idx` pair; `recorded` is its entry in the manifest."""
    if not recorded["documents"]:
        return
    for kind, digest in recorded["digests"].items():
        mask, _, suffix = kind.rpartition("_")
        path = Path(f"{prefix}{f'_{mask}' if mask else ''}.{suffix}")
        if not path.exists():
            yield f"{path} is missing"
        elif _sha256(path) != digest:
            yield f"{path} has changed"
    try:
        index = Index.read(Path(f"{prefix}.idx"))
        tokens = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r")
    except (OSError, ValueError) as error:
        yield str(error)
        return
    if (len(index.lengths), len(tokens)) != (recorded["documents"], recorded["tokens"]):
        yield f"{prefix} has {len(index.lengths)} documents and {len(tokens)} tokens, which does not match its manifest"
        return
    yield from _token_faults(prefix, index, tokens, content)


def _token_faults(prefix: Path, index: Index, tokens: np.ndarray, content: dict[str, Any]) -> Iterator[str]:
    for start in range(0, len(tokens), READ_BYTES):
        if int(tokens[start : start + READ_BYTES].max()) >= content["vocab_size"]:
            yield f"{prefix}.bin contains token ids outside the vocabulary"
            break
    for start in range(0, len(index.lengths), DOCUMENTS):
        lengths = index.lengths[start : start + DOCUMENTS].astype(np.int64)
        ends = index.pointers[start : start + DOCUMENTS] // index.dtype.itemsize + lengths
        if not ((lengths > 0) & (ends > 0) & (ends <= len(tokens))).all():
            yield f"{prefix}.idx refers to documents outside {prefix}.bin"
            break
        unterminated = tokens[ends - 1] != content["eod_token"]
        # Only the last part of a split document ends with the token.
        if (unterminated & (lengths != (content["split_tokens"] or -1))).any():
            yield f"{prefix} has a document that does not end with the end-of-document token"
            break


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
