"""Draw the prompts of an on-policy round, from files or from the run's own training documents.

All processes of the stage draw the same prompts.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from prune_distill.data.chat import ChatTemplate
from prune_distill.data.documents import document_key, shuffle_key
from prune_distill.data.encoder import TokenizersEncoder, TransformersEncoder, make_encoder
from prune_distill.data.folder import DataFolder
from prune_distill.data.readers import Lines, Source, parse, split_file
from prune_distill.data.shards import Index, map_tokens
from prune_distill.data.tokenizer import TokenizerSpec
from prune_distill.errors import InputError
from prune_distill.schema import OnPolicy

log = logging.getLogger("recipes.generate")

# Fields of a record with a prompt; see `OnPolicy.prompts`.
CHAT_FIELDS = ("messages", "conversations")
FIELDS = (*CHAT_FIELDS, "prompt", "text")


@dataclass
class Prompts:
    """Prompts as token ids.

    Attributes:
        too_long: number of prompts that were left out, because they and their completion exceed a sequence.
        lines: counts of the lines of the files.
    """

    ids: list[list[int]]
    too_long: int = 0
    lines: Lines = field(default_factory=Lines)

    def drop_too_long(self, on_policy: OnPolicy, seq_length: int) -> None:
        """Drop the prompts whose completion may not fit a sequence, which also holds an end-of-document token.

        Raises:
            InputError: none is left.
        """
        most = seq_length - on_policy.max_new_tokens - 1
        kept = [ids for ids in self.ids if len(ids) <= most]
        self.too_long, self.ids = len(self.ids) - len(kept), kept
        if self.too_long:
            log.warning("%d prompts have more than %d tokens and are left out", self.too_long, most)
        if not kept:
            raise InputError(
                f"distill.on_policy.prompts={on_policy.prompts}: no prompt is left of {self.lines.lines} records"
                f" ({self.lines.empty} empty, {self.lines.bad} broken, {self.too_long} with more than {most} tokens);"
                " add prompts, lower distill.on_policy.max_new_tokens, or raise distill.seq_length"
            )
        if len(kept) < on_policy.prompts_per_round:
            wanted = on_policy.prompts_per_round
            log.warning("%d prompts instead of distill.on_policy.prompts_per_round=%d", len(kept), wanted)


def read_prompts(files: Sequence[str], on_policy: OnPolicy, tokenizer: TokenizerSpec, seed: int) -> Prompts:
    """Draw prompts from files; records without a prompt are counted in the result's `lines`."""
    lines = Lines()
    drawn = heapq.nsmallest(
        on_policy.prompts_per_round,
        _read_texts(files, tokenizer, lines),
        key=lambda prompt: shuffle_key(document_key(prompt[0].encode()), seed),
    )
    encode = make_encoder(tokenizer, (TokenizersEncoder if tokenizer.backend else TransformersEncoder).name)
    ids = [encode(text)[: on_policy.prompt_tokens if is_document else None].tolist() for text, is_document in drawn]
    return Prompts(ids, lines=lines)


def _read_texts(files: Sequence[str], tokenizer: TokenizerSpec, lines: Lines) -> Iterator[tuple[str, bool]]:
    """Yield the text of each record, and whether only its beginning is the prompt."""
    template: ChatTemplate | None = None
    source = Source([piece for file in files for piece, _ in split_file(file, 2**62)], (*FIELDS, "tools"))
    for value in source:
        lines.lines += 1
        if isinstance(value, bytes) and value.isspace():
            lines.empty += 1
            continue
        try:
            record = parse(value)
            name = next((name for name in FIELDS if record.get(name) is not None), None)
            if name is None:
                raise ValueError(f"none of the fields {', '.join(FIELDS)}")
            if name in CHAT_FIELDS:
                template = template or _read_template(tokenizer)
                text = template.render_prompt(record[name], record.get("tools"))
            else:
                text = record[name]
            if not isinstance(text, str):
                raise ValueError(f"{name} is not a string")
            text.encode()
        except ValueError as reason:
            if isinstance(reason, InputError):
                raise
            lines.count_invalid(source.where(), str(reason))
        else:
            if not text or text.isspace():
                lines.empty += 1
                continue
            lines.documents += 1
            yield text, name == "text"


def _read_template(tokenizer: TokenizerSpec) -> ChatTemplate:
    if not tokenizer.chat:
        raise InputError(f"the tokenizer in {tokenizer.folder} has no chat template, which prompts with messages need")
    return ChatTemplate(tokenizer.folder)


def cut_prompts(data: DataFolder, on_policy: OnPolicy, seed: int) -> Prompts:
    """Draw beginnings of training documents.

    Raises:
        InputError: no document is long enough.
    """
    parts = [_Part.open(data.folder / part["prefix"]) for part in data.train]
    ends = np.cumsum([len(part.index.lengths) for part in parts])
    ids: list[list[int]] = []
    for number in np.random.default_rng(seed).permutation(int(ends[-1])):
        part = int(np.searchsorted(ends, number, side="right"))
        prompt = parts[part].beginning(int(number - (ends[part - 1] if part else 0)), on_policy.prompt_tokens)
        if prompt is not None:
            ids.append(prompt)
        if len(ids) == on_policy.prompts_per_round:
            break
    if not ids:
        raise InputError(
            f"distill.on_policy.prompt_tokens={on_policy.prompt_tokens}: no training document is longer; lower it, or"
            " name files in distill.on_policy.prompts"
        )
    return Prompts(ids)


@dataclass(frozen=True)
class _Part:
    """Training documents in one file, mapped from it, with their masks if they have some."""

    index: Index
    tokens: np.ndarray
    masks: _Part | None

    @classmethod
    def open(cls, prefix: Path) -> _Part:
        mask = prefix.with_name(f"{prefix.name}_mask")
        masks = cls.open(mask) if mask.with_name(f"{mask.name}.idx").exists() else None
        return cls(Index.read(prefix.with_name(f"{prefix.name}.idx")), map_tokens(prefix), masks)

    def document(self, number: int) -> np.ndarray:
        start = int(self.index.pointers[number]) // self.index.dtype.itemsize
        return self.tokens[start : start + int(self.index.lengths[number])]

    def beginning(self, number: int, tokens: int) -> list[int] | None:
        """Return the prompt of a document: its first tokens or, with a mask, all before the last learned span; None if
        nothing follows."""
        document = self.document(number)
        if self.masks is not None:
            learned = self.masks.document(number)
            starts = np.flatnonzero(np.diff(learned.astype(np.int8)) == 1) + 1
            if len(starts):
                return [int(token) for token in document[: starts[-1]]]
            if not learned.all():
                return None
        return document[:tokens].tolist() if len(document) > tokens + 1 else None
