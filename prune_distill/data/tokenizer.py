"""What is known of a model's tokenizer: read once, in a process of its own, and handed to the workers as plain data.

transformers decides what a folder's tokenizer is; it is imported without torch, which would cost a process 400 MB and
8 s.
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
    """A tokenizer as the workers build it.

    Attributes:
        folder: the Hugging Face folder that it is from.
        backend: the JSON of its `tokenizers.Tokenizer`; None for one in Python.
        eod_token: ends each document.
        vocab_size: of the model: ids are below.
        chat: whether there is a chat template.
    """

    folder: str
    backend: str | None
    eod_token: int
    vocab_size: int
    chat: bool

    @property
    def json(self) -> dict[str, Any]:
        """The backend parsed, again each time: kept, it would be 70 MB in every worker."""
        content: dict[str, Any] = json.loads(self.backend or "{}")
        return content

    @cached_property
    def fingerprint(self) -> str:
        """Changes with anything that could change an id."""
        text = self.backend or "".join(
            f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()}"
            for path in sorted(Path(self.folder).iterdir())
            if path.is_file() and path.suffix in (".json", ".model", ".txt")
        )
        return hashlib.sha256(f"{text}/{self.eod_token}".encode()).hexdigest()


def read_tokenizer(folder: Path, model: bool = True) -> TokenizerSpec:
    """The tokenizer of a Hugging Face folder.

    Args:
        model: whether its `config.json` bounds the ids; otherwise the tokenizer's own size does, and it needs no end of
            sequence.

    Raises:
        InputError: no end of sequence to end documents with, or one that the model lacks.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_read, str(folder), model).result()


def transformers_tokenizer(folder: str) -> Any:
    """The folder's tokenizer, for documents of any length."""
    tokenizer = load_tokenizer(folder)
    # A document longer than the model's context is normal here: it is cut into sequences later.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def _read(folder: str, model: bool) -> TokenizerSpec:
    tokenizer = transformers_tokenizer(folder)
    eod, vocab_size = tokenizer.eos_token_id, len(tokenizer)
    if model:
        vocab_size = parse(Path(folder) / "config.json")["vocab_size"]
    if model and eod is None:
        raise InputError(f"the tokenizer in {folder} has no eos_token to end documents with; set it in its config")
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
