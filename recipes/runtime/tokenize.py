"""JSONL documents to Megatron's indexed format with a Hugging Face tokenizer, in this process."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import InputError
from conf.schema import DataConfig
from recipes.runtime.indexed_data import DataFolder, DocumentWriter, batched

log = logging.getLogger("recipes.tokenize")

# Documents encoded together: the tokenizer's threads share a batch out.
BATCH = 512


@dataclass
class Lines:
    """Counts what a reader saw. `first_bad` names the first broken line: file, line, reason."""

    read: int = 0
    empty: int = 0
    bad: int = 0
    first_bad: str | None = None
    files: list[str] = field(default_factory=list)

    def note_bad(self, path: Path, number: int, reason: str) -> None:
        self.bad += 1
        self.first_bad = self.first_bad or f"{path}, line {number}: {reason}"


def read_documents(paths: Sequence[Path], text_key: str, lines: Lines) -> Iterator[str]:
    """The texts of JSONL files, in order. Empty texts and broken lines are counted in `lines` and left out."""
    for path in paths:
        lines.files.append(str(path))
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                lines.read += 1
                try:
                    document = json.loads(line)
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    lines.note_bad(path, number, f"no JSON ({error})")
                    continue
                text = document.get(text_key) if isinstance(document, dict) else None
                if not isinstance(text, str):
                    lines.note_bad(path, number, f"no text under the key {text_key!r}")
                elif not text.strip():
                    lines.empty += 1
                else:
                    yield text


def held_out(text: str, every: int) -> bool:
    """Whether a document belongs to validation: decided by its text alone, so that added files change nothing."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") % every == 0


def tokenize(
    cfg: DataConfig, train: Sequence[Path], validation: Sequence[Path] | None, tokenizer_folder: Path, out: Path
) -> tuple[DataFolder, Lines]:
    """Writes `out/train`, `out/validation` (`.bin/.idx`) and `out/data.json`.

    Args:
        train, validation: JSONL files; without validation files, held-out documents of `train` take their place.
        tokenizer_folder: a Hugging Face model folder; its `config.json` bounds the token ids.

    Raises:
        InputError: a tokenizer without end-of-sequence token or with ids that the model lacks, too many broken lines,
            or a split without documents.
    """
    tokenizer, vocab_size = _tokenizer(tokenizer_folder)
    writers = {name: DocumentWriter(out / name, vocab_size, tokenizer.eos_token_id) for name in ("train", "validation")}
    lines = Lines()
    for name, paths in (("train", train), ("validation", validation or ())):
        for texts in batched(read_documents(paths, cfg.text_key, lines), BATCH):
            for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
                ids = ids[: cfg.max_document_tokens]
                if ids and max(ids) >= vocab_size:
                    raise InputError(
                        f"the tokenizer in {tokenizer_folder} gives token id {max(ids)}, but the model's vocab_size is"
                        f" {vocab_size}; set model.hf_path to a folder whose tokenizer and config.json belong together"
                    )
                split = "validation" if not validation and held_out(text, cfg.holdout_every) else name
                writers[split].add(ids, len(text.encode("utf-8", "surrogatepass")))
    _check(cfg, lines, writers)
    for writer in writers.values():
        writer.finish()
    folder = DataFolder(
        out,
        train_documents=writers["train"].documents,
        train_tokens=writers["train"].tokens,
        validation_documents=writers["validation"].documents,
        validation_tokens=writers["validation"].tokens,
        validation_bytes=writers["validation"].bytes,
        vocab_size=vocab_size,
        eod_token=tokenizer.eos_token_id,
    )
    folder.write()
    log.info("%d + %d tokens from %d lines", folder.train_tokens, folder.validation_tokens, lines.read)
    return folder, lines


def _tokenizer(folder: Path) -> tuple[Any, int]:
    from transformers import AutoConfig, AutoTokenizer

    vocab_size = AutoConfig.from_pretrained(folder).vocab_size
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # A document longer than the model's context is normal here: it is cut into sequences later.
    tokenizer.model_max_length = int(1e30)
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer in {folder} has no eos_token to end documents with; set it in its config")
    if tokenizer.eos_token_id >= vocab_size:
        raise InputError(
            f"the tokenizer in {folder} ends documents with token id {tokenizer.eos_token_id}, but the model's"
            f" vocab_size is {vocab_size}; set model.hf_path to a folder whose tokenizer and config.json belong"
            " together"
        )
    return tokenizer, vocab_size


def _check(cfg: DataConfig, lines: Lines, writers: dict[str, DocumentWriter]) -> None:
    if lines.bad > cfg.max_bad_share * lines.read:
        raise InputError(
            f"{lines.bad} of {lines.read} lines are broken, more than data.max_bad_share={cfg.max_bad_share} allows;"
            f" the first: {lines.first_bad}"
        )
    if lines.bad:
        log.warning("%d of %d lines are broken and left out; the first: %s", lines.bad, lines.read, lines.first_bad)
    if not writers["train"].documents:
        raise InputError(f"no training documents in {', '.join(lines.files)}; each line needs a {cfg.text_key!r} text")
    if not writers["validation"].documents:
        raise InputError(
            f"no validation documents: none of {writers['train'].documents} was held out with"
            f" data.holdout_every={cfg.holdout_every}; set it lower, or name files in data.validation"
        )
