"""Load the tokenizer of a Hugging Face folder, saved by any version of transformers."""

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
    """Load a folder's tokenizer with transformers. Code in the folder is never run.

    If transformers has not been imported, it is imported without torch, which saves 400 MB and 8 s per process. If
    transformers cannot load the class that the folder names (`TokenizersBackend` of transformers 5), `tokenizer.json`
    is loaded alone; it determines the ids.

    Raises:
        InputError: transformers cannot read the tokenizer.
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
                raise ValueError("none of its files contains a tokenizer")
        return tokenizer
    except InputError as fault:
        if found := faults(folder):
            raise InputError("; ".join(found)) from fault
        if not described.exists():
            raise
        log.warning("%s; only its tokenizer.json is used", fault)
    with reading(folder, FIX):
        # transformers 4 would overwrite this setting of the file with its own default
        # (tokenization_utils_fast.py, __init__).
        pre_tokenizer = json.loads(described.read_text(encoding="utf-8")).get("pre_tokenizer") or {}
        options["add_prefix_space"] = pre_tokenizer.get("add_prefix_space", False)
        return PreTrainedTokenizerFast.from_pretrained(str(folder), trust_remote_code=False, **options)


def options_for_transformers_4(folder: Path) -> dict[str, Any]:
    """Return `from_pretrained` arguments that translate a `tokenizer_config.json` of transformers 5 to transformers 4.

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
