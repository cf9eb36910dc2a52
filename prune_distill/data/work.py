"""Make a shard in a worker process: read, encode and write documents, and take samples for the parent process."""

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
from prune_distill.data.shards import SPLITS, SplitWriter, Written, count_cluster_tokens, token_dtype
from prune_distill.data.tokenizer import TokenizerSpec
from prune_distill.errors import InputError
from prune_distill.pipeline.processes import exit_with_parent
from prune_distill.schema import DataConfig, DocumentFormat, LongDocuments

# Characters between samples, and characters of a sample: encoding samples again takes about a percent of the time.
SAMPLE_EVERY = 10_000_000
SAMPLE_CHARACTERS = 1_500


@dataclass(frozen=True)
class Settings:
    """Settings of all shards.

    Attributes:
        holdout_every: one in this many documents of the sources is held out; 0: none.
    """

    data: DataConfig
    seed: int
    tokenizer: TokenizerSpec
    source_tokenizer: TokenizerSpec | None
    holdout_every: int


@dataclass(frozen=True)
class Made:
    """A complete shard that is not yet published.

    Attributes:
        samples: texts and their ids from fastokens. The parent compares them with the model's tokenizer, which would
            take 120 MB in every worker.
    """

    manifest: dict[str, Any]
    samples: list[tuple[str, np.ndarray]]


_settings: Settings
_encoders: dict[str, Encoder] = {}
_renders: dict[DocumentFormat, docs.Render] = {}


def start_worker(settings: Settings) -> None:
    """Initialize a worker process. It ends with its parent, and ignores Ctrl-C, which the parent handles."""
    global _settings
    os.environ["FASTOKENS_BPE_THREADS"] = "1"  # there is one worker per core
    exit_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _settings = settings


def make_shard(shard: Shard, partial: Path, encoder: str, note: str | None = None) -> Made:
    """Make a shard in `partial`.

    Args:
        encoder: name of the encoder.
        note: why it is not the encoder that was chosen at the start.

    Raises:
        InputError: too many invalid lines, a truncated file, a token id outside the model's vocabulary.
    """
    try:
        return _make(shard, partial, encoder, note)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # so that partial files do not fill the disk
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
        lambda key: limit == 2**64 or docs.shuffle_key(key, _settings.seed) < limit,
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
            known = (document.key, document.cluster, 0)  # count the bytes once
    check_lines(lines, data.max_invalid_fraction)
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
        "clusters": count_cluster_tokens(partial / "train"),
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
    """Yield documents with their split, ids and, for chat, the loss mask; add to `samples`."""
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
            assert isinstance(own, TokenizersEncoder)  # the plan rejects masks with other tokenizers
            ids, offsets = own.encode_with_offsets(text)
            yield document, split, ids, docs.learned_tokens(document.learned, offsets)


def _parts(
    ids: np.ndarray, mask: np.ndarray | None, eod: np.ndarray, data: DataConfig
) -> Iterator[tuple[list[np.ndarray], np.ndarray | None]]:
    """Yield the ids of a document as they are written, in parts, with loss masks if masks are kept.

    The last part ends with the end-of-document token. The other parts of a split document have exactly
    `max_document_tokens` tokens.
    """
    limit = data.max_document_tokens
    if data.long_documents is LongDocuments.truncate and len(ids) > limit:
        ids = ids[:limit].copy()  # a copy, so that the rest is freed
        mask = None if mask is None else mask[:limit]
    # The end-of-document token alone is not a part.
    last = max(0, len(ids) - 1) // limit * limit
    for start in range(0, last + 1, limit):
        part = [ids[start : start + limit], *([eod] if start == last else [])]
        yield part, _learned(part, mask, start) if data.mask_prompts else None


def _learned(part: list[np.ndarray], mask: np.ndarray | None, start: int) -> np.ndarray:
    """Return the mask of a part that begins at token `start`. Its end token has the mask of the token before."""
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
    Path(f"{writer.prefix}.documents").unlink(missing_ok=True)  # equal to that of the tokens
    written.digests |= {f"mask_{kind}": digest for kind, digest in mask.digests.items()}


def check_lines(lines: Lines, max_invalid_fraction: float) -> None:
    """Check the number of invalid lines. Raises: InputError, if there are too many."""
    if lines.bad > max_invalid_fraction * lines.lines:
        raise InputError(
            f"data.max_invalid_fraction={max_invalid_fraction}: {lines.bad} of {lines.lines} lines are invalid (the "
            "first:"
            f" {lines.first_bad}); fix the files, or raise data.max_invalid_fraction"
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
