"""Divide the files of the sources into shards. Every process computes the same plan."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prune_distill.config.data_files import (
    HUB,
    Packing,
    document_fields,
    document_files,
    drop_duplicates,
    find_existing,
    is_on_hub,
    packing,
    sources,
    unreadable,
    validation_source,
)
from prune_distill.data.readers import Piece, parquet_metadata, split_file
from prune_distill.data.tokenizer import TokenizerSpec
from prune_distill.errors import InputError
from prune_distill.pipeline.identity import hashed_values
from prune_distill.schema import DataConfig, DataSource, DocumentFormat, Learn

log = logging.getLogger("recipes.prepare")

VALIDATION = "validation"
# About 250,000 tokens: the mean loss has a standard error of 0.005 if the loss per token has a deviation of 2.5.
HOLDOUTS = (10, 100, 1000, 10_000)
HELD_OUT_BYTES = 10**6


@dataclass(frozen=True)
class Shard:
    """A part of a source's documents, in order.

    Attributes:
        split: "train", of which documents may be held out, or "validation".
        keys: fields of the document, of which a record has one.
        bytes: bytes of the files, for the progress.
        settings: hash of everything that determines the result of the plan, except the content of the files.
    """

    number: int
    source: str
    split: str
    format: DocumentFormat
    keys: tuple[str, ...]
    sample: float
    pieces: tuple[Piece, ...]
    bytes: int
    settings: str

    @property
    def name(self) -> str:
        return f"{self.number:05d}"


def make_plan(
    data: DataConfig,
    files: Mapping[str, Sequence[str]],
    tokenizer: TokenizerSpec,
    source_tokenizer: TokenizerSpec | None,
    seed: int,
) -> list[Shard]:
    """Make the shards of a data section.

    Args:
        files: files by source, and of `validation` if it has its own.

    Raises:
        InputError: a source without files, or with files of an unknown kind, without the document's field, or damaged;
            all in one message.
    """
    faults = [fault for name, paths in files.items() for fault in _faults(name, paths, _source(data, name), data)]
    if data.learn is not Learn.all and tokenizer.backend is None:
        faults.append(f"data.learn={data.learn.value}: the tokenizer does not return token offsets; set data.learn=all")
    if any(_source(data, name).format is DocumentFormat.chat for name in files) and not tokenizer.chat:
        faults.append(f"the tokenizer in {tokenizer.folder} has no chat template, which data.format=chat needs")
    if faults:
        raise InputError("; ".join(faults))
    settings = hashlib.sha256(
        json.dumps(
            [
                hashed_values(data),
                tokenizer.fingerprint,
                source_tokenizer and source_tokenizer.fingerprint,
                seed,
                tokenizer.vocab_size,
            ]
        ).encode()
    ).hexdigest()
    shards: list[Shard] = []
    for name, paths in files.items():
        source, split = _source(data, name), VALIDATION if name == VALIDATION else "train"
        for pieces, size in _pack(paths, data.shard_bytes):
            place = (len(shards), name, split)
            shards.append(
                Shard(*place, source.format, document_fields(source), source.sample, tuple(pieces), size, settings)
            )
    return shards


def holdout_every(data: DataConfig, plan: Sequence[Shard]) -> int:
    """Return N if one in N training documents is held out.

    When a corpus grows, documents only move from validation to training, because each choice divides the next one.
    """
    if data.holdout_every is not None:
        return data.holdout_every
    size = sum(shard.bytes * shard.sample for shard in plan if shard.split != VALIDATION)
    return max((every for every in HOLDOUTS if size / every >= HELD_OUT_BYTES), default=HOLDOUTS[0])


def described(shards: Sequence[Shard]) -> list[dict[str, Any]]:
    """Return a plan as plain data, to compare it with the plan of another process."""
    return [asdict(shard) | {"format": shard.format.value} for shard in shards]


def local_files(paths: Any) -> list[str]:
    """The files that an input of the stage names, each once, those on the Hub downloaded first.

    Raises:
        InputError: what the Hub does not give.
    """
    several = [paths] if isinstance(paths, (str, Path)) else list(paths)
    found = [
        file for path in map(str, several) for file in (_from_hub(path) if is_on_hub(path) else document_files([path]))
    ]
    files = drop_duplicates(found)
    if repeated := list(Counter(found) - Counter(files)):
        log.warning("%d files are listed twice (the first: %s); each is read once", len(repeated), repeated[0])
    if empty := [file for file in files if os.path.exists(file) and os.path.getsize(file) == 0]:
        log.warning("%d files are empty (the first: %s)", len(empty), empty[0])
    return files


def _from_hub(url: str) -> list[str]:
    from huggingface_hub import snapshot_download  # half a second, only for data sets on the Hub

    match = HUB.fullmatch(url)
    if match is None:
        raise InputError(f"{url} is not a path in a dataset; write hf://datasets/OWNER/NAME[@REVISION]/GLOB")
    try:
        folder = snapshot_download(
            match["repo"], repo_type="dataset", revision=match["revision"], allow_patterns=match["pattern"]
        )
    except Exception as error:  # the Hub client's own errors, and its network library's
        raise InputError(
            f"{url} cannot be downloaded ({type(error).__name__}: {error}); download it on a machine with network "
            "access"
            " and set its folder"
        ) from error
    found = list(filter(os.path.isfile, find_existing(os.path.join(folder, match["pattern"]))))
    if not found:
        raise InputError(f"{url} matches no file of the dataset; check its list of files")
    return found


def _source(data: DataConfig, name: str) -> DataSource:
    return sources(data).get(name) or validation_source(data)


def _faults(name: str, paths: Sequence[str], source: DataSource, data: DataConfig) -> Iterator[str]:
    if not paths:
        yield f"{name} lists no files; set .jsonl, .jsonl.gz, .jsonl.zst or .parquet files"
    for path in paths:
        reason = unreadable(path)
        if reason is not None:
            yield f"{path} {reason}"
        elif packing(path) is Packing.parquet:
            columns = parquet_metadata(path).schema.to_arrow_schema().names
            if not set(document_fields(source)) & set(columns):
                yield (
                    f"{path} has no column {document_fields(source)[0]!r}, only {', '.join(columns)}; set the source's"
                    " key (data.text_key)"
                )


def _pack(paths: Sequence[str], shard_bytes: int) -> Iterator[tuple[list[Piece], int]]:
    """Group pieces until a group is as large as a shard; yield each with its size."""
    group: list[Piece] = []
    size = 0
    for path in paths:
        for piece, piece_size in split_file(path, shard_bytes):
            if group and size + piece_size > shard_bytes:
                yield group, size
                group, size = [], 0
            group.append(piece)
            size += piece_size
    if group:
        yield group, size
