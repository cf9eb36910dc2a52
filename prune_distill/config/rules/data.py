"""Rules of the group `data`."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
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
from prune_distill.config.rule import Finding, rule
from prune_distill.model.hf_tokenizer import faults as tokenizer_faults
from prune_distill.model.hf_tokenizer import has_chat_template
from prune_distill.schema import DataSource, DocumentFormat, Learn, RunConfig

# Other inputs of the stage that prepares data.
RESERVED = ("validation", "tokenizer", "source_tokenizer")
# Bytes of the first record that are read.
HEAD_BYTES = 1 << 20
VALIDATION = "data.validation"
SOURCES = tuple(f"data.{name}" for name in ("train", "sources", "format", "text_key", "sample"))


@rule("data.files", *SOURCES, VALIDATION, "model.demo?")
def files(cfg: RunConfig) -> Iterator[Finding]:
    data = cfg.data
    if data.train is None and data.sources is None and cfg.model.demo is None:
        yield Finding("data.train", "only the demo's model brings its own corpus; set data.train=[FILE.jsonl]")
    if data.train is None and data.sources is None and data.validation is not None:
        yield Finding(VALIDATION, "needs training documents too; set data.train=[FILE.jsonl]")
    if data.train is not None and data.sources is not None:
        yield Finding("data.train", "data.sources is set too; set one of the two to null")
    if data.sources == {}:
        yield Finding(
            "data.sources", "contains no source; set data.sources.NAME.files=[FILE.jsonl] or data.sources=null"
        )
    for key, named in (("data.train", data.train), (VALIDATION, data.validation)):
        if named == []:
            yield Finding(key, f"contains no file; set {key}=[FILE.jsonl] or {key}=null")
    trained_on = {file for source in sources(data).values() for file in source.files}
    shared = sorted(trained_on & set(data.validation or ()))
    if shared:
        key = "data.train" if data.sources is None else "data.sources"
        yield Finding(
            VALIDATION,
            f"{key} contains {', '.join(shared)} too; remove it from one of the two, or set {VALIDATION}=null to hold "
            "out some of the documents",
        )


@rule("data.sources", "data.sources")
def named_sources(cfg: RunConfig) -> Iterator[Finding]:
    for name, source in (cfg.data.sources or {}).items():
        key = f"data.sources.{name}"
        if not re.fullmatch(r"[\w-]+", name) or name in RESERVED:
            reserved = ", ".join(RESERVED)
            yield Finding(key, f"not a valid name; use letters and digits, and none of {reserved}", value=source)
        if not source.files:
            yield Finding(f"{key}.files", f"contains no file; set {key}.files=[FILE.jsonl]", value=[])


@rule("data.weights", *SOURCES)
def weights(cfg: RunConfig) -> Iterator[Finding]:
    known = sources(cfg.data)
    unweighted = [name for name, source in known.items() if source.weight is None]
    if unweighted and len(unweighted) < len(known):
        yield Finding(
            f"data.sources.{unweighted[0]}.weight",
            "other sources have a weight; set the weights of all, or all to null to read every source once",
            value=None,
        )


@rule("data.learn", *SOURCES, "data.learn", "data.split_turns")
def learn(cfg: RunConfig) -> Iterator[Finding]:
    data = cfg.data
    formats = {source.format for source in sources(data).values()}
    if data.learn is not Learn.all and DocumentFormat.chat not in formats:
        yield Finding("data.learn", "no documents are in the format chat; set data.learn=all or data.format=chat")
    if data.split_turns and data.learn is not Learn.assistant:
        yield Finding(
            "data.split_turns",
            f"has no effect with data.learn={data.learn.value}; set data.learn=assistant or data.split_turns=false",
        )


@rule("data.chat_template", *SOURCES, VALIDATION, "model.hf_path", "model.demo?", on_machine=True)
def chat_template(cfg: RunConfig) -> Iterator[Finding]:
    folder = Path(os.path.expanduser(cfg.model.hf_path or ""))
    chats = [key for key, source in _sources(cfg).items() if source.files and source.format is DocumentFormat.chat]
    if chats and cfg.model.demo is None and cfg.model.hf_path and folder.is_dir() and not has_chat_template(folder):
        yield Finding(
            "model.hf_path",
            f"its tokenizer has no chat template, which {chats[0]} needs for documents in the format chat; add the"
            " model's chat_template.jinja to the folder, or use a model that was trained on conversations",
        )


@rule("data.hub_files", *SOURCES, VALIDATION)
def hub_files(cfg: RunConfig) -> Iterator[Finding]:
    for key, source in _sources(cfg).items():
        for pattern in source.files:
            if is_on_hub(pattern) and not HUB.fullmatch(pattern):
                fix = f"set {key}=[hf://datasets/OWNER/NAME[@REVISION]/GLOB]"
                yield Finding(key, f"{pattern!r} names no files of a dataset on the Hub; {fix}", value=source.files)


@rule("data.exist", *SOURCES, VALIDATION, on_machine=True)
def exist(cfg: RunConfig) -> Iterator[Finding]:
    for key, source in _sources(cfg).items():
        missing = [pattern for pattern in source.files if not is_on_hub(pattern) and not find_existing(pattern)]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            yield Finding(
                key,
                f"{missing[0]}{more} not found; set {key}=[FILE.jsonl] to files that exist (relative to the working "
                "directory)",
                value=source.files,
            )


@rule("data.readable", *SOURCES, VALIDATION, on_machine=True)
def readable(cfg: RunConfig) -> Iterator[Finding]:
    """Report what local files reveal before they are read: at most one fault per source, as its files are alike."""
    for key, source in _sources(cfg).items():
        fault = next(filter(None, (_fault(path, source) for path in _files(source))), None)
        if fault is not None:
            yield Finding(key, fault, value=source.files)


@rule("data.leak", *SOURCES, VALIDATION, on_machine=True)
def leak(cfg: RunConfig) -> Iterator[Finding]:
    """A file of validation documents must not be trained on, whatever pattern or link names it."""
    known = _sources(cfg)
    validation = _files(known.pop(VALIDATION))
    for key, source in known.items():
        trained = _files(source)
        shared = (
            len(drop_duplicates(trained))
            + len(drop_duplicates(validation))
            - len(drop_duplicates([*trained, *validation]))
        )
        # The rule data.files reports what both name by the same pattern.
        if shared and not set(source.files) & set(cfg.data.validation or ()):
            yield Finding(
                key,
                f"{VALIDATION} names {shared} of these files too; remove them from one of the two, or set "
                f"{VALIDATION}=null to hold out some of the documents",
                value=source.files,
            )


@rule("data.source_tokenizer", *SOURCES, "data.source_tokenizer", on_machine=True)
def source_tokenizer(cfg: RunConfig) -> Iterator[Finding]:
    folder = Path(os.path.expanduser(cfg.data.source_tokenizer))
    reads_ids = any(source.format is DocumentFormat.tokens for source in sources(cfg.data).values())
    if reads_ids and os.path.isdir(folder):
        for fault in tokenizer_faults(folder):
            yield Finding("data.source_tokenizer", fault, names_file=True)


def _sources(cfg: RunConfig) -> dict[str, DataSource]:
    """The training sources and validation, by the key that names their files."""
    training_sources = {
        "data.train" if cfg.data.sources is None else f"data.sources.{name}.files": source
        for name, source in sources(cfg.data).items()
    }
    return {**training_sources, VALIDATION: validation_source(cfg.data)}


def _files(source: DataSource) -> list[str]:
    """The local files that a source names; a folder itself if nothing in it can hold documents."""
    paths = [path for pattern in source.files if not is_on_hub(pattern) for path in find_existing(pattern)]
    return [file for path in paths for file in document_files([path]) or [path]]


def _fault(path: str, source: DataSource) -> str | None:
    if os.path.isdir(path):
        return f"the folder {path} contains no documents; name .jsonl, .jsonl.gz, .jsonl.zst or .parquet files"
    reason = unreadable(path)
    if reason is not None:
        return f"{path} {reason}"
    record, keys = _first_record(path), document_fields(source)
    if record is None or any(key in record for key in keys):
        return None
    key = keys[0]
    parents = [name for name, value in record.items() if isinstance(value, dict) and key in value]
    nested = f" ({parents[0]!r} contains one, but it must be at the top level: rewrite the file)" if parents else ""
    return (
        f"the first record of {path} has no field {key!r}, only {', '.join(sorted(record))}{nested}; set "
        "data.text_key, or the source's key"
    )


def _first_record(path: str) -> dict[str, Any] | None:
    """The first record, where the standard library can read it; broken records are counted later."""
    kind = packing(path)
    if kind not in (Packing.plain, Packing.gz):
        return None
    try:
        with gzip.open(path, "rb") if kind is Packing.gz else open(path, "rb") as file:
            record = json.loads(file.readline(HEAD_BYTES))
    except (OSError, EOFError, ValueError, RecursionError, zlib.error):
        return None
    return record if isinstance(record, dict) else None
