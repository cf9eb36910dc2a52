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
# Chat templates end a conversation with the end-of-document token, or with it and a newline.
ENDED_WITHIN = 2


@dataclass(frozen=True)
class Settings:
    """Settings of all shards.

    Attributes:
        holdout_every: one in this many documents of the sources is held out; 0: none.
        masked: whether the masks of the losses are written.
    """

    data: DataConfig
    seed: int
    tokenizer: TokenizerSpec
    source_tokenizer: TokenizerSpec | None
    holdout_every: int
    masked: bool = False


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
    source = Source(list(shard.pieces), (*shard.keys, *docs.MORE_FIELDS.get(shard.format, ()), data.cluster_key))
    limit = round(shard.sample * 2**64)
    found = docs.documents(
        source,
        _renderer(shard.format),
        shard.keys,
        data.cluster_key,
        lambda key: limit == 2**64 or docs.shuffle_key(key, _settings.seed) < limit,
        lines,
        digest,
    )
    dtype = token_dtype(spec.vocab_size)
    writers = {split: SplitWriter(partial / split, dtype, spec.vocab_size) for split in SPLITS}
    masks, eod = _mask_writers(partial), spec.eod_token
    samples: list[tuple[str, np.ndarray]] = []
    size = 0
    for document, split, ids, mask in _encoded(found, shard, _encoder(encoder), samples):
        # Counted with the first part of a record that is written.
        size = document.bytes or size
        for part, learned in _parts(ids, mask, eod, data, document.ids is not None, lines):
            known, size = (document.key, document.cluster, size), 0
            writers[split].add(part, known)
            if _settings.masked:
                masks[split].add([learned], known)
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
        if document.ids is not None:
            yield document, split, document.ids, document.mask
        elif document.learned is None:
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
    ids: np.ndarray, mask: np.ndarray | None, eod: int, data: DataConfig, is_exact: bool, lines: Lines
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Yield the ids of a document as they are written, in parts, with the masks of their losses.

    The last part ends with the end-of-document token. The other parts of a split document have exactly
    `max_document_tokens` tokens. Parts without a learned token are not yielded.

    Args:
        mask: the mask of the ids; None: all are learned.
        is_exact: whether `mask` says all that is learned, so that a further end is not.
        lines: counts documents that are too long, and those of which nothing is left.
    """
    limit, how = data.max_document_tokens, data.long_documents
    ended = mask is not None and eod in ids[-ENDED_WITHIN:]
    too_long = len(ids) > limit
    lines.too_long += too_long
    if too_long and how is LongDocuments.drop:
        lines.dropped += 1
        return
    if too_long and how is LongDocuments.truncate:
        ids = ids[:limit].copy()  # a copy, so that the rest is freed
        mask = None if mask is None else mask[:limit]
    learns_end = not is_exact and (mask is None or not (ended or (too_long and how is LongDocuments.truncate)))
    # The end-of-document token alone is not a part.
    last = max(0, len(ids) - 1) // limit * limit
    yielded = False
    for start in range(0, last + 1, limit):
        part = ids[start : start + limit]
        learned = np.ones(len(part), dtype=np.uint8) if mask is None else mask[start : start + limit]
        if mask is not None and not learned.any():
            continue
        yielded = True
        if start == last and not (len(part) and part[-1] == eod and mask is not None):
            end = np.asarray([learns_end and (not len(part) or learned[-1])], dtype=np.uint8)
            yield [part, np.asarray([eod], dtype=np.uint32)], np.concatenate((learned, end))
        else:
            yield [part], learned
    lines.dropped += not yielded


def _mask_writers(partial: Path) -> dict[str, SplitWriter]:
    if not _settings.masked:
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
            format,
            _settings.tokenizer,
            _settings.source_tokenizer,
            _settings.data.learn,
            _settings.data.split_turns,
        )
    return _renders[format]
