"""The one place where a Hugging Face folder's tokenizer is loaded, whichever version of transformers saved it."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from prune_distill.errors import InputError, reading
from prune_distill.model.hf_tokenizer import faults, read_object

log = logging.getLogger("recipes.tokenizer")

FIX = "use a folder with a tokenizer.json that the installed transformers can read"


def load_tokenizer(folder: Path | str) -> Any:
    """The folder's tokenizer, by transformers. Code that comes with it is never run.

    Where this is the first to import transformers, it is imported without torch, which would take a process 400 MB and
    8 s. Where transformers cannot load the class that the folder names (`TokenizersBackend` of transformers 5) but
    `tokenizer.json` is readable, that file alone says which ids a text gets.

    Raises:
        InputError: there is no tokenizer that transformers can read.
    """
    if not {"torch", "transformers"} & set(sys.modules):
        os.environ["USE_TORCH"] = "0"
    # After USE_TORCH is set.
    from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

    folder = Path(folder)
    described = folder / "tokenizer.json"
    options = options_for_transformers_4(folder)
    try:
        with reading(folder, FIX):
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **options)
            # It returns False for some files that it cannot read (tokenization_utils_base.py, _from_pretrained).
            if not isinstance(tokenizer, PreTrainedTokenizerBase):
                raise ValueError("none of its files holds a tokenizer")
        return tokenizer
    except InputError as fault:
        if found := faults(folder):
            raise InputError("; ".join(found)) from fault
        if not described.exists():
            raise
        log.warning("%s; its tokenizer.json is used by itself", fault)
    with reading(folder, FIX):
        # transformers 4 would overwrite this setting of the file with its own default
        # (tokenization_utils_fast.py, __init__).
        pre_tokenizer = json.loads(described.read_text(encoding="utf-8")).get("pre_tokenizer") or {}
        options["add_prefix_space"] = pre_tokenizer.get("add_prefix_space", False)
        return PreTrainedTokenizerFast.from_pretrained(str(folder), trust_remote_code=False, **options)


def options_for_transformers_4(folder: Path) -> dict[str, Any]:
    """Arguments for `from_pretrained` that state in transformers 4's terms what a `tokenizer_config.json` of
    transformers 5 says.

    Version 5 has a list `extra_special_tokens`, which was `additional_special_tokens`, and a dict
    `model_specific_special_tokens`, which was `extra_special_tokens` (transformers/tokenization_utils_base.py).
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    config: dict[str, Any] = read_object(path)
    extra, named = config.get("extra_special_tokens"), config.get("model_specific_special_tokens")
    options: dict[str, Any] = {}
    if isinstance(extra, list):
        additional = config.get("additional_special_tokens") or []
        options = {"extra_special_tokens": {}, "additional_special_tokens": [*additional, *extra]}
    if isinstance(named, dict):
        options["extra_special_tokens"] = {**(extra if isinstance(extra, dict) else {}), **named}
    return options


def ids_by_token(tokenizer: dict[str, Any]) -> dict[str, int]:
    """The vocabulary of a parsed `tokenizer.json`, without added tokens.

    Unigram models list `[token, score]` pairs in the order of their ids; all others map tokens to ids.
    """
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {token: number for number, (token, _) in enumerate(vocabulary)}
