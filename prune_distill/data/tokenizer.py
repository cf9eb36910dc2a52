"""Read a model's tokenizer once, in a separate process, and pass it to the workers as plain data.

transformers is imported without torch, which saves 400 MB and 8 s per process.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prune_distill.data.hf_tokenizer import load_tokenizer
from prune_distill.errors import InputError
from prune_distill.model.hf_config import parse


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer as plain data.

    Attributes:
        folder: the Hugging Face folder.
        backend: JSON of its `tokenizers.Tokenizer`; None for a tokenizer written in Python.
        eod_token: id of the end-of-document token.
        vocab_size: vocabulary size of the model, which limits the ids.
        chat: whether it has a chat template.
    """

    folder: str
    backend: str | None
    eod_token: int
    vocab_size: int
    chat: bool

    @property
    def json(self) -> dict[str, Any]:
        """The parsed backend. Not cached: it would take 70 MB in every worker."""
        content: dict[str, Any] = json.loads(self.backend or "{}")
        return content

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that could change an id."""
        text = self.backend or "".join(
            f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()}"
            for path in sorted(Path(self.folder).iterdir())
            if path.is_file() and path.suffix in (".json", ".model", ".txt")
        )
        return hashlib.sha256(f"{text}/{self.eod_token}".encode()).hexdigest()


def read_tokenizer(folder: Path, model: bool = True) -> TokenizerSpec:
    """Read the tokenizer of a Hugging Face folder.

    Args:
        model: whether its `config.json` limits the ids; otherwise the size of the tokenizer does, and no
        end-of-sequence
            token is required.

    Raises:
        InputError: no end-of-sequence token, or one outside the model's vocabulary.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_read, str(folder), model).result()


def transformers_tokenizer(folder: str) -> Any:
    """Load the folder's tokenizer, for documents of any length."""
    tokenizer = load_tokenizer(folder)
    # Documents may be longer than the model's context: they are cut into sequences later.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def _read(folder: str, model: bool) -> TokenizerSpec:
    tokenizer = transformers_tokenizer(folder)
    eod, vocab_size = tokenizer.eos_token_id, len(tokenizer)
    if model:
        vocab_size = parse(Path(folder) / "config.json")["vocab_size"]
    if model and eod is None:
        raise InputError(f"the tokenizer in {folder} has no eos_token, which ends documents; set it in its config")
    if model and eod >= vocab_size:
        raise InputError(
            f"the tokenizer in {folder} ends documents with token id {eod}, but the model's vocab_size is"
            f" {vocab_size}; set model.hf_path to a folder whose tokenizer and config.json belong together"
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return TokenizerSpec(
        folder,
        None if backend is None else backend.to_str(),
        -1 if eod is None else eod,
        vocab_size,
        bool(getattr(tokenizer, "chat_template", None)),
    )
