"""Check that a student and its teacher have the same tokenizer. No torch, no NeMo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prune_distill.errors import InputError, reading
from prune_distill.model.hf_tokenizer import FETCH, ids_by_token

# Files that determine the text of an id.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
# Differing ids that a message names.
SHOWN = 3


def check_tokenizers(student: Path, teacher: Path, vocab_size: int | None = None) -> None:
    """Reject a teacher with another tokenizer than the student, which upstream does not check.

    Args:
        student, teacher: folders with tokenizer files.
        vocab_size: entries of the teacher's vocabulary.

    Raises:
        InputError: names both folders, and the first ids that differ.
    """
    fault = find_difference(student, teacher, vocab_size)
    if fault is not None:
        raise InputError(fault)


def find_difference(student: Path, teacher: Path, vocab_size: int | None = None) -> str | None:
    """Return how the tokenizers of two folders differ, as a sentence with a fix; None if they do not.

    Raises:
        InputError: a file cannot be read.
    """
    ours, theirs = (_tokenizer(folder) for folder in (student, teacher))
    ids: dict[str, int] = theirs.get("ids", {})
    largest = max(ids.values(), default=-1)
    if ours == theirs and vocab_size is not None and largest >= vocab_size:
        return (
            f"the tokenizer in {teacher} (teacher) has the id {largest}, but its config.json a vocab_size of"
            f" {vocab_size}; use a folder whose files belong together"
        )
    if ours == theirs:
        return None
    return (
        f"the tokenizers in {student} (student) and {teacher} (teacher) differ{_describe(ours.get('ids', {}), ids)};"
        " use a teacher with the student's tokenizer"
    )


def _describe(ours: dict[str, int], theirs: dict[str, int]) -> str:
    texts = [{number: token for token, number in ids.items()} for ids in (ours, theirs)]
    differing = sorted(number for number in {*texts[0], *texts[1]} if texts[0].get(number) != texts[1].get(number))
    if not differing:
        return " in their files" if not ours or not theirs else " in their merges"
    first = [f"{number} ({_quote(texts[0], number)} and {_quote(texts[1], number)})" for number in differing[:SHOWN]]
    more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    return f" in the ids {', '.join(first)}{more}"


def _quote(texts: dict[int, str], number: int) -> str:
    return repr(texts[number]) if number in texts else "nothing"


def _tokenizer(folder: Path) -> dict[str, Any]:
    """Return the content of a tokenizer: `ids` by token and the merges, or its files if it has no tokenizer.json."""
    described = folder / "tokenizer.json"
    with reading(described, FETCH):
        if not described.exists():
            return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()}
        tokenizer = json.loads(described.read_text(encoding="utf-8"))
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
        merges = tokenizer["model"].get("merges") or ()
        return {
            "ids": {str(token): number for token, number in (ids_by_token(tokenizer) | added).items()},
            # "a b" or ["a", "b"], depending on the version of tokenizers.
            "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        }
