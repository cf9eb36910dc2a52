"""The last step: what is taken of the shards, and the folder's `data.json`, which declares it whole.

Documents that are left out here (duplicates, those beyond a source's `max_tokens`) stay in the shards' `.bin`; a new
`.idx` beside a link to it passes over them, so nothing is written twice.
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
from prune_distill.data.documents import rank_of
from prune_distill.data.plan import VALIDATION, Shard, holdout_every
from prune_distill.data.readers import Lines
from prune_distill.data.shards import (
    SPLITS,
    Index,
    SplitWriter,
    clusters_of,
    documents_of,
    known_of,
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

# Keys are compared in so many parts, one at a time: 16 bytes a document of one part are held in memory.
KEY_PARTS = 64


def declare(data: DataConfig, plan: Sequence[Shard], out: Path, tokenizer: TokenizerSpec, seed: int) -> None:
    """Writes `validation.{bin,idx}` and `data.json` from complete shards.

    Raises:
        InputError: a split without documents, or a source with a weight and without any.
    """
    folders = {shard.number: out / SHARDS / shard.name for shard in plan}
    manifests = {shard.number: read_manifest(folders[shard.number]) for shard in plan}
    lines = Lines()
    for manifest in manifests.values():
        lines.add(Lines(**manifest["lines"]))
    _check(data, plan, manifests, lines)
    chosen = _chosen(data, plan, folders, manifests, seed)
    train = []
    for shard in plan:
        entry = _entry(shard, manifests[shard.number], chosen.get(shard.number), out)
        if entry["documents"]:
            train.append(entry)
    _weigh(train, data)
    validation = _gather(plan, folders, manifests, out, tokenizer)
    # Of processes that were killed. Not earlier: one that was only taken for dead may still be writing, and what it
    # makes gives way to a shard that is complete.
    for left_over in (out / SHARDS).glob(".*"):
        shutil.rmtree(left_over, ignore_errors=True)
    write_json(
        out / DATA,
        {
            "vocab_size": tokenizer.vocab_size,
            "eod_token": tokenizer.eod_token,
            "tokenizer": tokenizer.folder,
            "split_tokens": data.max_document_tokens if data.long_documents.value == "split" else None,
            "train": train,
            "validation": validation,
            "sources": _by_source(train),
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
            f"no validation documents: none of {documents['train']} was held out with"
            f" data.holdout_every={holdout_every(data, plan)}; set data.holdout_every={smaller}, or name files in"
            " data.validation"
        )


def _chosen(
    data: DataConfig, plan: Sequence[Shard], folders: dict[int, Path], manifests: dict[int, Any], seed: int
) -> dict[int, np.ndarray]:
    """Which training documents are taken, of shards that do not give all: `[documents]` bool by shard."""
    budgets = {name: source.max_tokens for name, source in sources(data).items() if source.max_tokens is not None}
    if not data.deduplicate and not budgets:
        return {}
    train = [shard for shard in plan if manifests[shard.number]["train"]["documents"]]
    known = {shard.number: known_of(folders[shard.number] / "train") for shard in train}
    keep = {number: np.ones(len(rows), dtype=bool) for number, rows in known.items()}
    if data.deduplicate:
        _leave_out_repeats(known, keep)
    for name, budget in budgets.items():
        own = [shard.number for shard in train if shard.source == name]
        _leave_out_beyond(budget, own, {n: _lengths(folders[n]) for n in own}, known, keep, seed)
    return keep


def _leave_out_repeats(known: dict[int, np.ndarray], keep: dict[int, np.ndarray]) -> None:
    """Of documents with the same key the first is kept. The parts of a document that was split are all of one key."""
    for part in range(KEY_PARTS):
        mine = {number: np.flatnonzero(rows["key"] % KEY_PARTS == part) for number, rows in known.items()}
        keys = np.concatenate([known[number]["key"][rows] for number, rows in mine.items()])
        # A document's first part has its bytes, further ones have none.
        is_first_part = np.concatenate([known[number]["bytes"][rows] > 0 for number, rows in mine.items()])
        document = np.cumsum(is_first_part)
        _, first, place = np.unique(keys, return_index=True, return_inverse=True)
        kept = document[first][place] == document
        for (number, rows), ours in zip(mine.items(), np.split(kept, _ends(mine)), strict=True):
            keep[number][rows] &= ours


def _ends(mine: dict[int, np.ndarray]) -> np.ndarray:
    return np.cumsum([len(rows) for rows in mine.values()])[:-1]


def _leave_out_beyond(
    budget: int,
    shards: Sequence[int],
    lengths: dict[int, np.ndarray],
    known: dict[int, np.ndarray],
    keep: dict[int, np.ndarray],
    seed: int,
) -> None:
    """Keeps documents in the seed's random order until there are `budget` tokens of them."""
    # Tokens by the first 16 bits of a document's rank, then document by document in the bin that the budget ends in.
    total = np.zeros(1 << 16, dtype=np.int64)
    for number in shards:
        own = keep[number]
        np.add.at(total, _bins(known[number][own], seed), lengths[number][own].astype(np.int64))
    ends = np.cumsum(total)
    last = int(np.searchsorted(ends, budget, side="right"))
    if last == len(total):
        if ends[-1] < budget:
            log.warning("a source holds %d tokens, fewer than its max_tokens=%d", ends[-1], budget)
        return
    left = budget - int(ends[last] - total[last])
    border = []
    for number in shards:
        bins = _bins(known[number], seed)
        keep[number] &= bins <= last
        for row in np.flatnonzero(keep[number] & (bins == last)).tolist():
            border.append((rank_of(int(known[number]["key"][row]), seed), number, row))
    for _, number, row in sorted(border):
        left -= int(lengths[number][row])
        if left < 0:
            keep[number][row] = False


def _bins(known: np.ndarray, seed: int) -> np.ndarray:
    return (rank_of(known["key"].astype(np.uint64), seed) >> 48).astype(np.int64)


def _entry(shard: Shard, manifest: dict[str, Any], keep: np.ndarray | None, out: Path) -> dict[str, Any]:
    """What `data.json` says of a shard's training documents, those that are not kept being passed over."""
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
        "clusters": clusters_of(source, keep),
    }


def _link(target: str, path: Path) -> None:
    path.unlink(missing_ok=True)
    os.symlink(target, path)


def _lengths(folder: Path) -> np.ndarray:
    return Index.read(folder / "train.idx").lengths


def _weigh(train: list[dict[str, Any]], data: DataConfig) -> None:
    """Gives each shard its share: of its source's weight, or of all tokens, as its tokens are."""
    tokens: dict[str, int] = defaultdict(int)
    for entry in train:
        tokens[entry["source"]] += entry["tokens"]
    weights = {name: source.weight for name, source in sources(data).items()}
    absent = sorted(name for name, weight in weights.items() if weight is not None and name not in tokens)
    if absent:
        raise InputError(f"data.sources.{absent[0]} has a weight, but gives no documents; take it out")
    for entry in train:
        weight = weights.get(entry["source"])
        share = tokens[entry["source"]] if weight is None else weight
        entry["weight"] = share * entry["tokens"] / tokens[entry["source"]]


def _by_source(train: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in train:
        own = found.setdefault(entry["source"], {"documents": 0, "tokens": 0, "weight": 0.0, "clusters": {}})
        for key in ("documents", "tokens", "weight"):
            own[key] += entry[key]
        for cluster, tokens in entry["clusters"].items():
            own["clusters"][cluster] = own["clusters"].get(cluster, 0) + tokens
    return found


def _gather(
    plan: Sequence[Shard], folders: dict[int, Path], manifests: dict[int, Any], out: Path, tokenizer: TokenizerSpec
) -> dict[str, Any]:
    """All validation documents in one `.bin/.idx`: they are few, and evaluations read them end to end."""
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
        for ids, known in zip(documents_of(prefix), known_of(prefix).tolist(), strict=True):
            writer.add([ids], known)
        if masks is not None:
            for mask in documents_of(Path(f"{prefix}_mask")):
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
