"""Check that two checkpoints have the same tokenizer. No torch, no NeMo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prune_distill.data.hf_tokenizer import ids_by_token
from prune_distill.errors import InputError
from prune_distill.pipeline.names import CONTEXT, TOKENIZER

# Files that determine the text of an id.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def check_tokenizers(student: Path, teacher: Path) -> None:
    """Reject two NeMo checkpoints whose tokenizers differ, which upstream does not check.

    Raises:
        InputError: names both folders, and an id that differs.
    """
    folders = [checkpoint / CONTEXT / TOKENIZER for checkpoint in (student, teacher)]
    contents = [_tokenizer(folder) for folder in folders]
    if contents[0] == contents[1]:
        return
    first, second = ({str(token): number for token, number in content.get("ids", {}).items()} for content in contents)
    differing = sorted(set(first.items()) ^ set(second.items()), key=lambda item: (item[1], item[0]))
    example = f", for example in id {differing[0][1]} ({differing[0][0]!r})" if differing else " (in their merges)"
    raise InputError(
        f"the tokenizers in {folders[0]} (student) and {folders[1]} (teacher) differ{example};"
        " prune the student from this teacher"
    )


def _tokenizer(folder: Path) -> dict[str, Any]:
    """Return the content of a tokenizer: `ids` by token and the merges, or its files if it has no tokenizer.json."""
    content: dict[str, Any] = {}
    described = folder / "tokenizer.json"
    if not described.exists():
        return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()}
    tokenizer = json.loads(described.read_text())
    model = tokenizer["model"]
    content["ids"] = ids_by_token(tokenizer) | {
        token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()
    }
    # "a b" or ["a", "b"], depending on the version of tokenizers.
    content["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ()]
    return content
