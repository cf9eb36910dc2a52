"""Files of documents as the data section names them: how they are packed, and the sources that they make up."""

from __future__ import annotations

import glob
import os
import re
from enum import Enum

from conf.schema import DataConfig, DataSource, DocumentFormat

# Where a record has its document, by format, unless the config names another key.
KEYS = {DocumentFormat.text: "text", DocumentFormat.tokens: "tokens", DocumentFormat.chat: "messages"}
HUB = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<pattern>.+)")


class Packing(Enum):
    """How a file holds its records."""

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
_MAGIC = {Packing.gz: b"\x1f\x8b", Packing.zst: b"\x28\xb5\x2f\xfd", Packing.parquet: b"PAR1"}


def packing(path: str) -> Packing | None:
    """How a file is packed, by the end of its name; None for no file of documents."""
    return next((kind for suffix, kind in _SUFFIXES.items() if path.endswith(suffix)), None)


def sources(data: DataConfig) -> dict[str, DataSource]:
    """The training sources by name: `data.sources`, or the one that `data.train` stands for."""
    if data.sources is not None:
        return data.sources
    key = data.text_key if data.format is DocumentFormat.text else None
    return {"train": DataSource(files=data.train or [], format=data.format, key=key, sample=data.sample)}


def key_of(source: DataSource) -> str:
    return source.key or KEYS[source.format]


def existing(pattern: str) -> list[str]:
    """The files or folders of a pattern that are on this machine, in order of name."""
    return sorted(glob.glob(os.path.expanduser(pattern), recursive=True))


def on_hub(pattern: str) -> bool:
    """Whether a name is that of files in a dataset on the Hub: hf://datasets/OWNER/NAME[@REVISION]/GLOB."""
    return pattern.startswith("hf://")


def unreadable(path: str) -> str | None:
    """Why a local file cannot hold documents, from its name and its first bytes; None where nothing speaks against."""
    kind = packing(path)
    if kind is None:
        return f"is of no known kind; name files that end in {', '.join(_SUFFIXES)}"
    with open(path, "rb") as file:
        head = file.read(4)
    magic = _MAGIC.get(kind)
    if magic is not None and not head.startswith(magic):
        return f"is no {kind.value} file, whatever its name says"
    return None
