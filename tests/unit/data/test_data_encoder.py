"""The fast encoder returns the tokenizer's ids; otherwise another one replaces it, with a reason."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fastokens
import numpy as np
import pytest

from prune_distill.data import encoder as encoders
from prune_distill.data.encoder import FastokensEncoder, TransformersEncoder, choose, hard_texts, make_encoder
from prune_distill.data.tokenizer import TokenizerSpec, read_tokenizer
from prune_distill.errors import InputError
from tests.helpers.tokenizers import byte_level, sentencepiece_bpe, words


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenizerSpec]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {style: read_tokenizer(byte_level(folder / style, style=style)) for style in ("qwen", "gpt2")}


def changed(spec: TokenizerSpec, **parts: Any) -> TokenizerSpec:
    """A tokenizer with parts of its tokenizer.json replaced."""
    return replace(spec, backend=json.dumps({**spec.json, **parts}))


@pytest.mark.parametrize("style", ["qwen", "gpt2"])
def test_fastokens_is_chosen_and_gives_the_tokenizers_ids(specs: dict[str, TokenizerSpec], style: str) -> None:
    name, reason = choose(specs[style])
    assert name == "fastokens", reason
    fast = FastokensEncoder(specs[style])
    text = "Text with <|im_start|> and <|im_end|>, a<|endoftext|>b, e\u0301, <|im_star and a <| b"
    assert fast(text).tolist() == fast.own(text).tolist()
    assert {0, 1, 2} <= set(fast(text).tolist())
    # Backtracking regular expressions fail on it.
    spaces = "x" + " " * 200_000 + "y"
    assert np.array_equal(fast(spaces), fast.own(spaces))


def test_added_tokens_with_different_prefixes(specs: dict[str, TokenizerSpec]) -> None:
    tokens = specs["qwen"].json["added_tokens"]
    more = {**tokens[0], "id": max(specs["qwen"].json["model"]["vocab"].values()) + 1, "special": False}
    spec = changed(specs["qwen"], added_tokens=[*tokens, {**more, "content": "</tool_call>"}])
    assert choose(spec)[0] == "fastokens"
    fast = FastokensEncoder(spec)
    for text in ("a </tool_call> b", "</tool_cal> <|im_end|>", "<td></td> a <| b", "</tool_call>\u0301 e\u0301"):
        assert fast(text).tolist() == fast.own(text).tolist()
    assert more["id"] in fast("a </tool_call> b")


@pytest.mark.parametrize("style", ["qwen", "gpt2"])
def test_every_code_point_is_split_equally(
    specs: dict[str, TokenizerSpec], style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both libraries have equal Unicode tables: checked for every fifth code point, in a run for every 61st."""
    monkeypatch.setattr(encoders, "STRIDE", 5)
    fast = FastokensEncoder(specs[style])
    for text in hard_texts(specs[style]):
        assert np.array_equal(fast(text), fast.own(text)), text[:50]


def test_sentencepiece_bpe_is_supported(tmp_path: Path) -> None:
    spec = read_tokenizer(sentencepiece_bpe(tmp_path / "sentencepiece"))
    name, reason = choose(spec)
    assert name == "fastokens", reason
    fast = FastokensEncoder(spec)
    for text in ("The quick brown fox", "  two spaces", "汉字 👍🏽 </s> \x00", ""):
        assert fast(text).tolist() == fast.own(text).tolist()


def test_hard_texts_reach_every_plane(specs: dict[str, TokenizerSpec]) -> None:
    seen = {ord(letter) >> 16 for text in hard_texts(specs["qwen"]) for letter in text}
    assert seen == set(range((sys.maxunicode >> 16) + 1))


def test_ids_need_not_be_in_the_order_of_merges(specs: dict[str, TokenizerSpec]) -> None:
    spec, model = specs["qwen"], specs["qwen"].json["model"]
    special = {token["content"] for token in spec.json["added_tokens"]}
    last = max(model["vocab"].values())
    turned = {token: number if token in special else last + 3 - number for token, number in model["vocab"].items()}
    other = changed(spec, model={**model, "vocab": turned})
    assert choose(other)[0] == "fastokens"
    text = "The quick brown fox, Größe und 汉字"
    ours, before = FastokensEncoder(other)(text), FastokensEncoder(spec)(text)
    assert (last + 3 - before).tolist() == ours.tolist() == FastokensEncoder(other).own(text).tolist()


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"normalizer": {"type": "NFKC"}}, "unsupported normalizer type: NFKC"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "unsupported pre-tokenizer type: Whitespace"),
        ({"normalizer": {"type": "Lowercase"}}, None),
        ({"normalizer": None}, None),
    ],
)
def test_tokenizers_of_other_kinds_keep_their_own_encoder(
    specs: dict[str, TokenizerSpec], part: dict[str, Any], reason: str | None
) -> None:
    name, message = choose(changed(specs["qwen"], **part))
    assert name == ("fastokens" if reason is None else "tokenizers")
    assert reason is None or reason in message


def test_texts_that_fastokens_rejects_use_the_fallback(specs: dict[str, TokenizerSpec]) -> None:
    pattern = {"Regex": r"(?:a|b)*c|\s+(?!\S)|\S+|\s"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    spec = changed(specs["qwen"], pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte]})
    fast = FastokensEncoder(spec)
    fast._encode = fastokens.Tokenizer.from_json_str(spec.backend, pcre2_match_limit=10).encode_batch_flat
    backtracking = "ab" * 100
    with pytest.raises(ValueError, match="match limit exceeded"):
        fast._encode([backtracking])
    assert fast(backtracking).tolist() == fast.own(backtracking).tolist()


def test_truncation_and_padding_in_the_file_are_ignored(specs: dict[str, TokenizerSpec]) -> None:
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    fast = FastokensEncoder(changed(specs["qwen"], truncation=truncation, padding=padding))
    for text in ("fox", "The quick brown fox jumps over the lazy dog"):
        assert fast(text).tolist() == fast.own(text).tolist() == FastokensEncoder(specs["qwen"])(text).tolist()


def test_a_difference_is_detected_and_reported(
    specs: dict[str, TokenizerSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(FastokensEncoder):
        def __init__(self, spec: TokenizerSpec) -> None:
            super().__init__(spec)
            self._encode = FastokensEncoder(changed(spec, pre_tokenizer=specs["gpt2"].json["pre_tokenizer"]))._encode

    monkeypatch.setattr(encoders, "FastokensEncoder", Other)
    name, reason = choose(specs["qwen"])
    assert name == "tokenizers"
    assert reason.startswith("fastokens returns other ids for ")


def test_a_word_tokenizer_uses_its_own_library(tmp_path: Path) -> None:
    spec = read_tokenizer(words(tmp_path / "words", ["<eos>", "alpha", "beta"], 3))
    name, reason = choose(spec)
    assert name == "tokenizers"
    assert "unsupported" in reason
    assert make_encoder(spec, name)("beta alpha other").tolist() == [2, 1, 1]
    assert TransformersEncoder(spec)("beta alpha other").tolist() == [2, 1, 1]
    assert choose(replace(spec, backend=None))[0] == "transformers"


@pytest.mark.parametrize(
    ("vocab_size", "eos", "fault"), [(3, None, "has no eos_token"), (0, "<eos>", "ends documents with token id 0")]
)
def test_a_tokenizer_that_cannot_end_documents_is_rejected(
    tmp_path: Path, vocab_size: int, eos: str | None, fault: str
) -> None:
    folder = words(tmp_path / "words", ["<eos>", "alpha", "beta"], vocab_size, eos)
    if vocab_size == 0:
        (folder / "config.json").write_text('{"vocab_size": 0}')
    with pytest.raises(InputError, match=fault):
        read_tokenizer(folder)


def test_the_fingerprint_covers_everything_that_affects_ids(specs: dict[str, TokenizerSpec]) -> None:
    spec = specs["qwen"]
    assert replace(spec, folder="elsewhere").fingerprint == spec.fingerprint
    assert replace(spec, eod_token=0).fingerprint != spec.fingerprint
    assert changed(spec, normalizer=None).fingerprint != spec.fingerprint
