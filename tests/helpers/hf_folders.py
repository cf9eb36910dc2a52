"""Hugging Face model folders that are complete but empty: weights are holes, and the tokenizer knows one token."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

from prune_distill.model.hf_config import read_config
from prune_distill.model.hf_weights import ITEM_BYTES, expected_shapes

Shapes = Mapping[str, tuple[int, ...]]
TOKENIZER = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}}


def write_safetensors(file: Path, shapes: Shapes, dtype: str = "BF16", **types: str) -> None:
    """A safetensors file whose tensors are holes.

    Args:
        types: the types of single tensors, by their names; the others have the type `dtype`.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        kind = types.get(name, dtype)
        size = math.prod(shape) * ITEM_BYTES[kind]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    data = json.dumps(header).encode()
    with file.open("wb") as target:
        target.write(struct.pack("<Q", len(data)) + data)
        target.truncate(8 + len(data) + end)


def complete(folder: Path) -> Path:
    """Add the files that a folder with a `config.json` also needs."""
    write_weights(folder)
    write_tokenizer(folder)
    return folder


def write_weights(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", expected_shapes(read_config(folder / "config.json")))


def write_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))


def hub_snapshot(folder: Path, cache: Path) -> tuple[Path, Path]:
    """Move a complete model into a Hub cache, whose snapshots contain links; return the snapshot and the blobs."""
    snapshot, blobs = cache / "models--a--b" / "snapshots" / "0123", cache / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in complete(folder).iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return snapshot, blobs
