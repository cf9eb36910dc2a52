"""One shard's work, in a worker process: read, encode, write, and take samples that its parent looks at."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prune_distill.data import documents as docs
from prune_distill.data.encoder import Encoder, FastokensEncoder, TokenizersEncoder, make_encoder
from prune_distill.data.plan import Shard
from prune_distill.data.readers import Lines, Source
from prune_distill.data.shards import SPLITS, SplitWriter, Written, clusters_of, token_dtype
from prune_distill.data.tokenizer import TokenizerSpec
from prune_distill.errors import InputError
from prune_distill.pipeline.processes import end_with_parent
from prune_distill.schema import DataConfig, DocumentFormat, LongDocuments

# Of so much text (in characters) so much is a sample: encoded again at a fiftieth of the speed, a percent of the time.
SAMPLE_EVERY = 10_000_000
SAMPLE_CHARACTERS = 1_500


@dataclass(frozen=True)
class Settings:
    """What every shard is made with.

    Attributes:
        holdout_every: one in so many documents of the sources is held out; 0: none.
    """

    data: DataConfig
    seed: int
    tokenizer: TokenizerSpec
    source_tokenizer: TokenizerSpec | None
    holdout_every: int


@dataclass(frozen=True)
class Made:
    """A shard that is whole, and waits to be given its place.

    Attributes:
        samples: of what fastokens encoded, texts and their ids. The model's own tokenizer compares them in the parent:
            here it would take every worker 120 MB.
    """

    manifest: dict[str, Any]
    samples: list[tuple[str, np.ndarray]]


_settings: Settings
_encoders: dict[str, Encoder] = {}
_renders: dict[DocumentFormat, docs.Render] = {}


def start_worker(settings: Settings) -> None:
    """Prepares a worker process. It ends with the one that started it, which alone heeds Ctrl-C."""
    global _settings
    os.environ["FASTOKENS_BPE_THREADS"] = "1"  # there is a worker for every core
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _settings = settings


def make_shard(shard: Shard, partial: Path, encoder: str, note: str | None = None) -> Made:
    """Makes a shard in `partial`.

    Args:
        encoder: its name; note: why it is not the one that was chosen at the start.

    Raises:
        InputError: too many bad lines, a file that ends too early, a token id that the model lacks.
    """
    try:
        return _make(shard, partial, encoder, note)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # or it would fill a full disk
        raise


def _make(shard: Shard, partial: Path, encoder: str, note: str | None) -> Made:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    data, spec, lines, digest = _settings.data, _settings.tokenizer, Lines(), hashlib.sha256()
    source = Source(list(shard.pieces), (shard.key, data.cluster_key))
    limit = round(shard.sample * 2**64)
    found = docs.documents(
        source,
        _renderer(shard.format),
        shard.key,
        data.cluster_key,
        lambda key: limit == 2**64 or docs.rank_of(key, _settings.seed) < limit,
        lines,
        digest,
    )
    dtype = token_dtype(spec.vocab_size)
    writers = {split: SplitWriter(partial / split, dtype, spec.vocab_size) for split in SPLITS}
    masks, eod = _mask_writers(partial), np.asarray([spec.eod_token], dtype=np.uint32)
    samples: list[tuple[str, np.ndarray]] = []
    for document, split, ids, mask in _encoded(found, shard, _encoder(encoder), samples):
        known = (document.key, document.cluster, document.bytes)
        for part, learned in _parts(ids, mask, eod, data):
            writers[split].add(part, known)
            if learned is not None:
                masks[split].add([learned], known)
            known = (document.key, document.cluster, 0)  # its bytes are counted once
    check_lines(lines, data.max_bad_share)
    written = {name: writer.finish() for name, writer in writers.items()}
    for split, writer in masks.items():
        _finish_mask(writer, written[split])
    manifest = {
        "shard": shard.number,
        "source": shard.source,
        "split": shard.split,
        "pieces": [asdict(piece) for piece in shard.pieces],
        "lines": asdict(lines),
        **{split: asdict(written[split]) for split in SPLITS},
        "clusters": clusters_of(partial / "train"),
        "texts_sha256": digest.hexdigest(),
        "tokenizer": spec.fingerprint,
        "settings": shard.settings,
        "encoder": encoder,
        "encoder_note": note,
    }
    return Made(manifest, samples)


def _encoded(
    found: Iterator[docs.Document], shard: Shard, encoder: Encoder, samples: list[tuple[str, np.ndarray]]
) -> Iterator[tuple[docs.Document, str, np.ndarray, np.ndarray | None]]:
    """Documents with their split, ids and, of chat, the mask of what is learned; adds to `samples` on the way."""
    since_sample, every = SAMPLE_EVERY, _settings.holdout_every
    for document in found:
        text = document.text
        split = "validation" if every and docs.held_out(document.key, every) else shard.split
        if document.learned is None:
            since_sample += len(text)
            if since_sample >= SAMPLE_EVERY and isinstance(encoder, FastokensEncoder):
                since_sample = 0
                samples.append((text[:SAMPLE_CHARACTERS], encoder(text[:SAMPLE_CHARACTERS])))
            yield document, split, encoder(text), None
        else:
            own = encoder.own if isinstance(encoder, FastokensEncoder) else encoder
            assert isinstance(own, TokenizersEncoder)  # the plan has refused chat with masks for other tokenizers
            ids, offsets = own.with_offsets(text)
            yield document, split, ids, docs.learned_tokens(document.learned, offsets)


def _parts(
    ids: np.ndarray, mask: np.ndarray | None, eod: np.ndarray, data: DataConfig
) -> Iterator[tuple[list[np.ndarray], np.ndarray | None]]:
    """A document's ids as they are written, in parts of one document each, with what is learned where that is kept.

    The last part ends in the end-of-document token. Of a document that is split, the others have exactly
    `max_document_tokens`, and none.
    """
    limit = data.max_document_tokens
    if data.long_documents is LongDocuments.cut and len(ids) > limit:
        ids = ids[:limit].copy()  # or the rest would be held until this is written
        mask = None if mask is None else mask[:limit]
    # A whole number of parts leaves nothing for the last: its end token alone is no document.
    last = max(0, len(ids) - 1) // limit * limit
    for start in range(0, last + 1, limit):
        part = [ids[start : start + limit], *([eod] if start == last else [])]
        yield part, _learned(part, mask, start) if data.mask_prompts else None


def _learned(part: list[np.ndarray], mask: np.ndarray | None, start: int) -> np.ndarray:
    """The mask of a part that begins at token `start`; its end is learned where what is before it is."""
    learned = np.ones(sum(map(len, part)), dtype=np.uint8)
    if mask is not None:
        inside = mask[start : start + len(part[0])]
        learned[: len(inside)] = inside
        learned[len(inside) :] = inside[-1] if len(inside) else 1
    return learned


def _mask_writers(partial: Path) -> dict[str, SplitWriter]:
    if not _settings.data.mask_prompts:
        return {}
    return {split: SplitWriter(partial / f"{split}_mask", np.dtype(np.uint8), 2) for split in SPLITS}


def _finish_mask(writer: SplitWriter, written: Written) -> None:
    mask = writer.finish()
    Path(f"{writer.prefix}.documents").unlink(missing_ok=True)  # the same as its tokens'
    written.digests |= {f"mask_{kind}": digest for kind, digest in mask.digests.items()}


def check_lines(lines: Lines, max_bad_share: float) -> None:
    """Raises: InputError, where more of a shard's lines are broken than is allowed."""
    if lines.bad > max_bad_share * lines.lines:
        raise InputError(
            f"{lines.bad} of {lines.lines} lines are broken, more than data.max_bad_share={max_bad_share} allows; the"
            f" first: {lines.first_bad}"
        )


def _encoder(name: str) -> Encoder:
    if name not in _encoders:
        _encoders[name] = make_encoder(_settings.tokenizer, name)
    return _encoders[name]


def _renderer(format: DocumentFormat) -> docs.Render:
    if format not in _renders:
        _renders[format] = docs.renderer(
            format, _settings.tokenizer, _settings.source_tokenizer, _settings.data.mask_prompts
        )
    return _renders[format]
