"""The last step: select documents from the shards and write `data.json`, which completes the folder.

Excluded documents (duplicates, those beyond a source's `max_tokens`) stay in the shards' `.bin`. A new `.idx` next to a
link to it skips them, so no tokens are written twice.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prune_distill.config.data_files import sources
from prune_distill.data.documents import shuffle_key
from prune_distill.data.plan import VALIDATION, Shard, holdout_every
from prune_distill.data.readers import Lines
from prune_distill.data.shards import (
    SPLITS,
    Index,
    SplitWriter,
    count_cluster_tokens,
    read_document_info,
    read_documents,
    read_manifest,
    token_dtype,
    write_index,
)
from prune_distill.data.tokenizer import TokenizerSpec
from prune_distill.errors import InputError
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.names import DATA, SHARDS
from prune_distill.schema import DataConfig

log = logging.getLogger("recipes.declare")

# Number of parts in which keys are compared. One part is in memory at a time, with 16 bytes per document.
KEY_PARTS = 64


def declare(data: DataConfig, plan: Sequence[Shard], out: Path, tokenizer: TokenizerSpec, seed: int) -> None:
    """Write `validation.{bin,idx}` and `data.json` from complete shards.

    Raises:
        InputError: a split without documents, or a source with a weight but without documents.
    """
    folders = {shard.number: out / SHARDS / shard.name for shard in plan}
    manifests = {shard.number: read_manifest(folders[shard.number]) for shard in plan}
    lines = Lines()
    for manifest in manifests.values():
        lines.add(Lines(**manifest["lines"]))
    _check(data, plan, manifests, lines)
    chosen = _select_documents(data, plan, folders, manifests, seed)
    train = []
    for shard in plan:
        entry = _entry(shard, manifests[shard.number], chosen.get(shard.number), out)
        if entry["documents"]:
            train.append(entry)
    _set_weights(train, data)
    validation = _merge_validation(plan, folders, manifests, out, tokenizer)
    # Leftovers of killed processes. They are removed only now, because a process that was presumed dead may still
    # write; its result is discarded if the shard is complete.
    for leftover in (out / SHARDS).glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)
    write_json(
        out / DATA,
        {
            "vocab_size": tokenizer.vocab_size,
            "eod_token": tokenizer.eod_token,
            "tokenizer": tokenizer.folder,
            "split_tokens": data.max_document_tokens if data.long_documents.value == "split" else None,
            "train": train,
            "validation": validation,
            "sources": _summarize_sources(train),
            "lines": vars(lines),
        },
    )


def _check(data: DataConfig, plan: Sequence[Shard], manifests: dict[int, Any], lines: Lines) -> None:
    files = sorted({piece.path for shard in plan for piece in shard.pieces})
    documents = {split: sum(manifest[split]["documents"] for manifest in manifests.values()) for split in SPLITS}
    if not documents["train"]:
        first = f" (the first: {lines.first_bad})" if lines.first_bad else ""
        raise InputError(
            f"no training documents in {', '.join(files[:3])}: {lines.lines} lines, {lines.empty} of them empty,"
            f" {documents['validation']} held out, {lines.bad} broken{first}"
        )
    if not documents["validation"]:
        smaller = max(2, documents["train"] // 20)
        raise InputError(
            f"data.holdout_every={holdout_every(data, plan)}: none of {documents['train']} documents is held out for"
            f" validation; set data.holdout_every={smaller}, or name files in"
            " data.validation"
        )


def _select_documents(
    data: DataConfig, plan: Sequence[Shard], folders: dict[int, Path], manifests: dict[int, Any], seed: int
) -> dict[int, np.ndarray]:
    """Select training documents: `[documents]` bool by shard, for shards of which some documents are excluded."""
    budgets = {name: source.max_tokens for name, source in sources(data).items() if source.max_tokens is not None}
    if not data.deduplicate and not budgets:
        return {}
    train = [shard for shard in plan if manifests[shard.number]["train"]["documents"]]
    known = {shard.number: read_document_info(folders[shard.number] / "train") for shard in train}
    keep = {number: np.ones(len(rows), dtype=bool) for number, rows in known.items()}
    if data.deduplicate:
        _exclude_duplicates(known, keep)
    for name, budget in budgets.items():
        own = [shard.number for shard in train if shard.source == name]
        _apply_token_budget(budget, own, {n: _lengths(folders[n]) for n in own}, known, keep, seed)
    return keep


def _exclude_duplicates(known: dict[int, np.ndarray], keep: dict[int, np.ndarray]) -> None:
    """Keep the first document of each key. All parts of a split document have the same key."""
    for part in range(KEY_PARTS):
        mine = {number: np.flatnonzero(rows["key"] % KEY_PARTS == part) for number, rows in known.items()}
        keys = np.concatenate([known[number]["key"][rows] for number, rows in mine.items()])
        # Only the first part of a document records its bytes.
        is_first_part = np.concatenate([known[number]["bytes"][rows] > 0 for number, rows in mine.items()])
        document = np.cumsum(is_first_part)
        _, first, place = np.unique(keys, return_index=True, return_inverse=True)
        kept = document[first][place] == document
        for (number, rows), ours in zip(mine.items(), np.split(kept, _offsets(mine)), strict=True):
            keep[number][rows] &= ours


def _offsets(mine: dict[int, np.ndarray]) -> np.ndarray:
    return np.cumsum([len(rows) for rows in mine.values()])[:-1]


def _apply_token_budget(
    budget: int,
    shards: Sequence[int],
    lengths: dict[int, np.ndarray],
    known: dict[int, np.ndarray],
    keep: dict[int, np.ndarray],
    seed: int,
) -> None:
    """Keep documents in random order until they reach `budget` tokens."""
    # Count tokens by the first 16 bits of the random order; then select documents within the bin where the budget ends.
    total = np.zeros(1 << 16, dtype=np.int64)
    for number in shards:
        own = keep[number]
        np.add.at(total, _bins(known[number][own], seed), lengths[number][own].astype(np.int64))
    ends = np.cumsum(total)
    last = int(np.searchsorted(ends, budget, side="right"))
    if last == len(total):
        if ends[-1] < budget:
            log.warning("a source contains %d tokens, fewer than its max_tokens=%d", ends[-1], budget)
        return
    left = budget - int(ends[last] - total[last])
    border = []
    for number in shards:
        bins = _bins(known[number], seed)
        keep[number] &= bins <= last
        for row in np.flatnonzero(keep[number] & (bins == last)).tolist():
            border.append((shuffle_key(int(known[number]["key"][row]), seed), number, row))
    for _, number, row in sorted(border):
        left -= int(lengths[number][row])
        if left < 0:
            keep[number][row] = False


def _bins(known: np.ndarray, seed: int) -> np.ndarray:
    return (shuffle_key(known["key"].astype(np.uint64), seed) >> 48).astype(np.int64)


def _entry(shard: Shard, manifest: dict[str, Any], keep: np.ndarray | None, out: Path) -> dict[str, Any]:
    """Return the entry in `data.json` for a shard's selected training documents."""
    written = manifest["train"]
    entry = {
        "prefix": f"shards/{shard.name}/train",
        "source": shard.source,
        "documents": written["documents"],
        "tokens": written["tokens"],
        "clusters": manifest["clusters"],
    }
    if keep is None or keep.all():
        return entry
    prefix = out / "selected" / shard.name
    source = out / SHARDS / shard.name / "train"
    prefix.parent.mkdir(exist_ok=True)
    index = Index.read(Path(f"{source}.idx"))
    for suffix in ("", "_mask"):
        if Path(f"{source}{suffix}.bin").exists():
            part = Index.read(Path(f"{source}{suffix}.idx"))
            _link(f"../shards/{shard.name}/train{suffix}.bin", Path(f"{prefix}{suffix}.bin"))
            write_index(Path(f"{prefix}{suffix}.idx"), part.dtype, part.lengths[keep], part.pointers[keep])
    return entry | {
        "prefix": f"selected/{shard.name}",
        "documents": int(keep.sum()),
        "tokens": int(index.lengths[keep].sum(dtype=np.int64)),
        "clusters": count_cluster_tokens(source, keep),
    }


def _link(target: str, path: Path) -> None:
    path.unlink(missing_ok=True)
    os.symlink(target, path)


def _lengths(folder: Path) -> np.ndarray:
    return Index.read(folder / "train.idx").lengths


def _set_weights(train: list[dict[str, Any]], data: DataConfig) -> None:
    """Set the weight of each shard: its part, by tokens, of its source's weight or of all tokens."""
    tokens: dict[str, int] = defaultdict(int)
    for entry in train:
        tokens[entry["source"]] += entry["tokens"]
    weights = {name: source.weight for name, source in sources(data).items()}
    absent = sorted(name for name, weight in weights.items() if weight is not None and name not in tokens)
    if absent:
        raise InputError(f"data.sources.{absent[0]} has a weight but no documents; remove it")
    for entry in train:
        weight = weights.get(entry["source"])
        share = tokens[entry["source"]] if weight is None else weight
        entry["weight"] = share * entry["tokens"] / tokens[entry["source"]]


def _summarize_sources(train: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in train:
        own = found.setdefault(entry["source"], {"documents": 0, "tokens": 0, "weight": 0.0, "clusters": {}})
        for key in ("documents", "tokens", "weight"):
            own[key] += entry[key]
        for cluster, tokens in entry["clusters"].items():
            own["clusters"][cluster] = own["clusters"].get(cluster, 0) + tokens
    return found


def _merge_validation(
    plan: Sequence[Shard], folders: dict[int, Path], manifests: dict[int, Any], out: Path, tokenizer: TokenizerSpec
) -> dict[str, Any]:
    """Merge all validation documents into one `.bin/.idx`: they are few, and evaluation reads them in sequence."""
    partial = out / ".validation"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    writer = SplitWriter(partial / VALIDATION, token_dtype(tokenizer.vocab_size), tokenizer.vocab_size)
    masked = [number for number in folders if (folders[number] / "validation_mask.bin").exists()]
    masks = SplitWriter(partial / f"{VALIDATION}_mask", np.dtype(np.uint8), 2) if masked else None
    for shard in plan:
        prefix = folders[shard.number] / VALIDATION
        if not manifests[shard.number]["validation"]["documents"]:
            continue
        for ids, known in zip(read_documents(prefix), read_document_info(prefix).tolist(), strict=True):
            writer.add([ids], known)
        if masks is not None:
            for mask in read_documents(Path(f"{prefix}_mask")):
                masks.add([mask], (0, 0, 0))
    written = writer.finish()
    digests = dict(written.digests)
    if masks is not None:
        digests |= {f"mask_{kind}": digest for kind, digest in masks.finish().digests.items()}
    for path in sorted(partial.iterdir()):
        if path.suffix != ".documents":
            os.replace(path, out / path.name)
    shutil.rmtree(partial)
    return {"documents": written.documents, "tokens": written.tokens, "bytes": written.bytes, "digests": digests}
