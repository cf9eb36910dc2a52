"""Reads a prepared folder again and compares it with what was noted when it was written."""

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

READ_BYTES = 4 << 20
DOCUMENTS = 1 << 16
# As many faults are told.
MOST_FAULTS = 20


def check_folder(folder: Path) -> str:
    """What a folder holds, in a sentence.

    Raises:
        InputError: it is not complete, or something in it is not as it was written.
    """
    content = _content(folder)
    faults = list(_faults(folder, content))
    if faults:
        more = f", and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
        raise InputError(f"{folder}: {'; '.join(faults[:MOST_FAULTS])}{more}; remove the folder and prepare it again")
    train, validation = content["train"], content["validation"]
    return (
        f"{folder}: {sum(part['documents'] for part in train):,} training documents of"
        f" {sum(part['tokens'] for part in train):,} tokens in {len(train)} parts, {validation['documents']:,}"
        f" validation documents of {validation['tokens']:,} tokens; all of it is as it was written"
    )


def document_text(folder: Path, split: str, number: int) -> str:
    """A document as text, with a line that says where it is. Raises: InputError, where there is no such document."""
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
    raise InputError(f"{folder} has {before} {split} documents, counted from 0; there is no document {number}")


def _content(folder: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((folder / "data.json").read_text())
    except FileNotFoundError:
        raise InputError(f"{folder} has no data.json: it is no prepared folder, or not complete") from None
    return content


def _faults(folder: Path, content: dict[str, Any]) -> Iterator[str]:
    for shard in sorted((folder / "shards").iterdir()):
        if shard.name.startswith("."):
            yield f"{shard.name} was left by a process that was killed"
            continue
        manifest = read_manifest(shard)
        for split in SPLITS:
            yield from _split_faults(shard / split, manifest[split], content)
        lines = manifest["lines"]
        if lines["lines"] != sum(lines[kind] for kind in ("documents", "empty", "bad", "left_out")):
            yield f"{shard.name} does not account for all of its lines"
    yield from _split_faults(folder / "validation", content["validation"], content)
    for part in content["train"]:
        try:
            index = Index.read(folder / f"{part['prefix']}.idx")
        except (OSError, ValueError) as error:
            yield str(error)
            continue
        if (len(index.lengths), int(index.lengths.sum(dtype=np.int64))) != (part["documents"], part["tokens"]):
            yield f"{part['prefix']} has other documents than data.json says"


def _split_faults(prefix: Path, noted: dict[str, Any], content: dict[str, Any]) -> Iterator[str]:
    """What is wrong with one `.bin/.idx`, `noted` being what was written."""
    if not noted["documents"]:
        return
    for kind, digest in noted["digests"].items():
        mask, _, suffix = kind.rpartition("_")
        path = Path(f"{prefix}{f'_{mask}' if mask else ''}.{suffix}")
        if not path.exists():
            yield f"{path} is gone"
        elif _sha256(path) != digest:
            yield f"{path} is not what was written"
    try:
        index = Index.read(Path(f"{prefix}.idx"))
        tokens = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r")
    except (OSError, ValueError) as error:
        yield str(error)
        return
    if (len(index.lengths), len(tokens)) != (noted["documents"], noted["tokens"]):
        yield f"{prefix} has {len(index.lengths)} documents and {len(tokens)} tokens, not as many as were written"
        return
    yield from _token_faults(prefix, index, tokens, content)


def _token_faults(prefix: Path, index: Index, tokens: np.ndarray, content: dict[str, Any]) -> Iterator[str]:
    for start in range(0, len(tokens), READ_BYTES):
        if int(tokens[start : start + READ_BYTES].max()) >= content["vocab_size"]:
            yield f"{prefix}.bin holds token ids that the model has not"
            break
    for start in range(0, len(index.lengths), DOCUMENTS):
        lengths = index.lengths[start : start + DOCUMENTS].astype(np.int64)
        ends = index.pointers[start : start + DOCUMENTS] // index.dtype.itemsize + lengths
        if not ((lengths > 0) & (ends > 0) & (ends <= len(tokens))).all():
            yield f"{prefix}.idx names documents that are not in {prefix}.bin"
            break
        open_ended = tokens[ends - 1] != content["eod_token"]
        # The parts of a document that was split have no end but the last.
        if (open_ended & (lengths != (content["split_tokens"] or -1))).any():
            yield f"{prefix} has a document that does not end with the end-of-document token"
            break


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
