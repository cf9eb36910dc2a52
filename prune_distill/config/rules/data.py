"""Rules of the section `data`, each fault naming a key, its value and the value to set instead."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from prune_distill.config.data_files import (
    HUB,
    Packing,
    document_files,
    drop_duplicates,
    find_existing,
    is_on_hub,
    key_of,
    packing,
    sources,
    unreadable,
)
from prune_distill.schema import DataSource, DocumentFormat, RunConfig

Rule = Callable[[RunConfig], Iterator[str]]

# Inputs of the stage that are no sources.
RESERVED = ("validation", "tokenizer", "source_tokenizer")
# Of the first record no more than this is read.
HEAD_BYTES = 1 << 20
VALIDATION = "data.validation"


def which(cfg: RunConfig) -> Iterator[str]:
    """Where the documents come from is said once."""
    data = cfg.data
    if data.train is None and data.sources is None and cfg.model.demo is None:
        yield "data.train=null, but only the demo's model brings its own corpus; set data.train=[FILE.jsonl]"
    if data.train is None and data.sources is None and data.validation is not None:
        yield f"data.validation={data.validation} is set without data.train; set data.train=[FILE.jsonl] too"
    if data.train is not None and data.sources is not None:
        yield "data.train and data.sources are both set, but sources are named in one place; set one of them to null"
    if data.sources == {}:
        yield "data.sources={} names no source; set data.sources.NAME.files=[FILE.jsonl], or data.sources=null"
    for key, files in (("train", data.train), ("validation", data.validation)):
        if files == []:
            yield f"data.{key}=[] names no file; set data.{key}=[FILE.jsonl], or data.{key}=null"
    trained_on = {file for source in sources(data).values() for file in source.files}
    shared = sorted(trained_on & set(data.validation or ()))
    if shared:
        yield (
            f"data.validation holds {', '.join(shared)}, which data.{'train' if data.sources is None else 'sources'} "
            "holds too; take it out of one of them, or set data.validation=null to hold out some of the documents"
        )


def each(cfg: RunConfig) -> Iterator[str]:
    for name, source in (cfg.data.sources or {}).items():
        at = f"data.sources.{name}"
        if not re.fullmatch(r"[\w-]+", name) or name in RESERVED:
            yield f"{at} is no name for a source; use letters and digits, and none of {', '.join(RESERVED)}"
        if not source.files:
            yield f"{at}.files=[] names no file; set {at}.files=[FILE.jsonl]"


def weights(cfg: RunConfig) -> Iterator[str]:
    known = sources(cfg.data)
    without = [name for name, source in known.items() if source.weight is None]
    if without and len(without) < len(known):
        yield (
            f"data.sources.{without[0]}.weight=null, but other sources have one; set all of them, or all to null to "
            "read every source once"
        )


def formats(cfg: RunConfig) -> Iterator[str]:
    kinds = {source.format for source in sources(cfg.data).values()}
    if cfg.data.mask_prompts and DocumentFormat.chat not in kinds:
        yield "data.mask_prompts=True needs data of format=chat; set data.mask_prompts=false, or data.format=chat"
    for key, pattern in _patterns(cfg):
        if is_on_hub(pattern) and not HUB.fullmatch(pattern):
            yield f"{key} holds {pattern!r}; write hf://datasets/OWNER/NAME[@REVISION]/GLOB"


RULES: tuple[Rule, ...] = (which, each, weights, formats)


def missing(cfg: RunConfig) -> Iterator[str]:
    absent: dict[str, list[str]] = {}
    for key, pattern in _patterns(cfg):
        if not is_on_hub(pattern) and not find_existing(pattern):
            absent.setdefault(key, []).append(pattern)
    for key, names in absent.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield (
            f"{key} names {names[0]}{more}, not to be found; set {key}=[FILE.jsonl] to files that "
            "exist (relative to the working directory), or put them there"
        )


def readable(cfg: RunConfig) -> Iterator[str]:
    """Report what local files reveal before they are read: at most one fault per source, as its files are alike."""
    for key, source in _sources(cfg).items():
        fault = next(filter(None, (_fault(path, source) for path in _files(source))), None)
        if fault is not None:
            yield f"{key} names {fault}"


def leaks(cfg: RunConfig) -> Iterator[str]:
    """A file of validation documents must not be trained on, by whatever pattern or link it is named."""
    known = _sources(cfg)
    validation = _files(known.pop(VALIDATION))
    for key, source in known.items():
        trained = _files(source)
        shared = (
            len(drop_duplicates(trained))
            + len(drop_duplicates(validation))
            - len(drop_duplicates([*trained, *validation]))
        )
        # What both name by the same pattern is reported from the config alone.
        if shared and not set(source.files) & set(cfg.data.validation or ()):
            yield (
                f"{key} names {shared} of the files that {VALIDATION} names; name them in one of the two, or set "
                f"{VALIDATION}=null to hold out some of the documents"
            )


RULES_OF_FILES: tuple[Rule, ...] = (missing, readable, leaks)


def _sources(cfg: RunConfig) -> dict[str, DataSource]:
    """The training sources and validation, by the key that names their files."""
    training_sources = {
        "data.train" if cfg.data.sources is None else f"data.sources.{name}.files": source
        for name, source in sources(cfg.data).items()
    }
    return {**training_sources, VALIDATION: DataSource(cfg.data.validation or [], cfg.data.format, cfg.data.text_key)}


def _files(source: DataSource) -> list[str]:
    """The local files that a source names; a folder itself if nothing in it can hold documents."""
    paths = [path for pattern in source.files if not is_on_hub(pattern) for path in find_existing(pattern)]
    return [file for path in paths for file in document_files([path]) or [path]]


def _fault(path: str, source: DataSource) -> str | None:
    if os.path.isdir(path):
        return f"{path}, a folder without documents; name one with .jsonl, .jsonl.gz, .jsonl.zst or .parquet files"
    reason = unreadable(path)
    if reason is not None:
        return f"{path}, which {reason}"
    record, key = _first_record(path), key_of(source)
    if record is None or key in record:
        return None
    parents = [name for name, value in record.items() if isinstance(value, dict) and key in value]
    nested = f" ({parents[0]!r} holds one, but it must be at the top level: rewrite the file)" if parents else ""
    return (
        f"{path}, whose first record has no field {key!r}, only {', '.join(sorted(record))}{nested}; set "
        "data.text_key, or the source's key"
    )


def _first_record(path: str) -> dict[str, Any] | None:
    """The first record, where the standard library can tell; a broken record is counted later."""
    kind = packing(path)
    if kind not in (Packing.plain, Packing.gz):
        return None
    try:
        with gzip.open(path, "rb") if kind is Packing.gz else open(path, "rb") as file:
            record = json.loads(file.readline(HEAD_BYTES))
    except (OSError, EOFError, ValueError, RecursionError, zlib.error):
        return None
    return record if isinstance(record, dict) else None


def _patterns(cfg: RunConfig) -> Iterator[tuple[str, str]]:
    yield from ((key, pattern) for key, source in _sources(cfg).items() for pattern in source.files)
