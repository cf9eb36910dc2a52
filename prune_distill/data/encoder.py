"""Encode text to token ids with fastokens if its ids equal those of the model's tokenizer, else with that tokenizer.

fastokens reads the same `tokenizer.json` and is fifty times as fast. Its ids are verified on hard texts before anything
is written, and on a sample of every shard.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Protocol

import fastokens
import numpy as np
import tokenizers

from prune_distill.data.tokenizer import TokenizerSpec, transformers_tokenizer
from prune_distill.model.hf_tokenizer import ids_by_token

# One in this many code points from U+3000 on is tried. All of them take 14 s and showed no difference.
STRIDE = 61


class Encoder(Protocol):
    """Returns the token ids of a text, `[tokens]` of an integer type, without special tokens."""

    name: str

    def __call__(self, text: str) -> np.ndarray: ...


class TokenizersEncoder:
    """The model's tokenizer, through the library that transformers uses."""

    name = "tokenizers"

    def __init__(self, spec: TokenizerSpec) -> None:
        assert spec.backend is not None
        self._tokenizer = tokenizers.Tokenizer.from_str(spec.backend)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def find_mismatch(self, samples: Sequence[tuple[str, np.ndarray]]) -> str | None:
        """Return the first text whose ids differ from the given ids, or None. Texts are encoded in parallel."""
        encodings = self._tokenizer.encode_batch([text for text, _ in samples], add_special_tokens=False)
        pairs = zip(samples, encodings, strict=True)
        return next((text for (text, ids), own in pairs if not np.array_equal(ids, own.ids)), None)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return ids `[tokens]` and the character offsets of each token `[tokens, 2]`."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return np.asarray(encoding.ids, dtype=np.int64), offsets


class TransformersEncoder:
    """A tokenizer written in Python, without a fast version."""

    name = "transformers"

    def __init__(self, spec: TokenizerSpec) -> None:
        self._tokenizer = transformers_tokenizer(spec.folder)

    def __call__(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)


class FastokensEncoder:
    """fastokens on the model's `tokenizer.json`, with the model's tokenizer as the fallback for single texts.

    Raises:
        ValueError: fastokens does not support the tokenizer; with the reason.
    """

    name = "fastokens"

    def __init__(self, spec: TokenizerSpec) -> None:
        assert spec.backend is not None
        self._spec = spec
        tokenizer = fastokens.Tokenizer.from_json_str(spec.backend)
        tokenizer.no_truncation()
        self._encode = tokenizer.encode_batch_flat  # `encode` creates a Python integer per id

    def __call__(self, text: str) -> np.ndarray:
        try:
            ids, _ = self._encode([text])
        except ValueError:  # a limit of its regular expressions
            return self.own(text)
        return np.frombuffer(ids, dtype=np.uint32)

    @cached_property
    def own(self) -> TokenizersEncoder:
        """The model's tokenizer, built on first use: 120 MB with 151,000 entries."""
        return TokenizersEncoder(self._spec)


def make_encoder(spec: TokenizerSpec, name: str) -> Encoder:
    """Make an encoder by name."""
    kinds: dict[str, Callable[[TokenizerSpec], Encoder]] = {
        kind.name: kind for kind in (FastokensEncoder, TokenizersEncoder, TransformersEncoder)
    }
    return kinds[name](spec)


def choose(spec: TokenizerSpec) -> tuple[str, str]:
    """Return the name of the fastest encoder with the tokenizer's ids, and the reason for the choice."""
    if spec.backend is None:
        return TransformersEncoder.name, "the tokenizer is written in Python"
    try:
        fast = FastokensEncoder(spec)
    except ValueError as reason:
        return TokenizersEncoder.name, str(reason)
    tried = 0
    for text in hard_texts(spec):
        tried += 1
        if not np.array_equal(fast(text), fast.own(text)):
            return TokenizersEncoder.name, f"fastokens returns other ids for {text[:40]!r}"
    return FastokensEncoder.name, f"its ids equal the tokenizer's on {tried} hard texts"


def hard_texts(spec: TokenizerSpec) -> Iterator[str]:
    """Yield texts on which tokenizers are likely to differ."""
    yield from _HARD
    points = [*range(0x3000), *range(0x3000, sys.maxunicode + 1, STRIDE)]
    letters = [chr(point) for point in points if not 0xD800 <= point < 0xE000]
    for start in range(0, len(letters), 512):
        some = letters[start : start + 512]
        # Each character between letters, digits, punctuation and spaces, and doubled.
        yield "\n".join(f"a{letter}b 1{letter}!{letter} {letter}{letter}" for letter in some)
        yield unicodedata.normalize("NFD", "".join(some))
    tokenizer = spec.json
    for token in tokenizer.get("added_tokens", [])[:64]:
        content = token["content"]
        yield f"a{content}b {content} \n{content}{content}\u0301 {content[:-1]}"
    vocabulary = list(_decode_vocabulary(ids_by_token(tokenizer)))
    for start in range(0, len(vocabulary), 512):
        yield "\n".join(vocabulary[start : start + 512])
        yield "".join(vocabulary[start : start + 512])


_HARD = (
    "",
    " ",
    "\n",
    "  two  spaces   three    four \t tab\t\t\u00a0no-break\u2003em \u3000ideographic",
    "trailing   \n\n   leading\r\n\r\nwindows \r old mac\x0b\x0c\x1c\x85\u2028\u2029",
    "a" * 3000,
    " " * 3000 + "x",
    "\n" * 3000,
    "=-" * 1500,
    "1 12 123 1234 12345 1234567890123 3.14159 1e-10 0xdeadbeef ١٢٣٤ ४५६ ½ Ⅷ ² 𝟘𝟙𝟚",  # noqa: RUF001
    "I'll you've we're he'd I'm don't O'CLOCK I'LL YOU'VE 's'S'ſ ''ll ’ll",  # noqa: RUF001
    "snake_case camelCase __init__(self, *args) -> None:  # comment\n\tif x != y: return {'a': [1,2]}\n",
    "é e\u0301 Å A\u030a \u212b ﬁ ﬃ ① ㍿ \u1e9b\u0323 q\u0307\u0323 각 \u1100\u1161\u11a8 \u0344 \u2126 \u212a \u037e",
    "汉字漢字かなカナ한국어 ไทย العربية עברית हिन्दी தமிழ் Ελληνικά Кириллица Հայերեն ქართული አማርኛ ខ្មែរ",
    "👍🏽👩\u200d👩\u200d👧\u200d👦🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
    "🇩🇪 \ufe0f\ufeff\u200b\u200d\u2060\u00ad",
    "\x00\x01\x7f\u0080\ufffd\ufffe\uffff\U0010ffff\ue000\U000f0000",
)


def byte_alphabet() -> dict[str, int]:
    """Return the characters that stand for bytes in byte-level tokenizers (GPT-2's `bytes_to_unicode`)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{chr(byte): byte for byte in plain}, **{chr(256 + n): byte for n, byte in enumerate(others)}}


def token_bytes(token: str, alphabet: dict[str, int]) -> bytes | None:
    """Return the bytes of a byte-level token; None if it contains other characters."""
    try:
        return bytes(alphabet[letter] for letter in token)
    except KeyError:
        return None


def _decode_vocabulary(vocabulary: dict[str, int]) -> Iterator[str]:
    alphabet = byte_alphabet()
    for token in sorted(vocabulary, key=vocabulary.__getitem__):
        content = token_bytes(token, alphabet)
        yield token if content is None else content.decode("utf-8", "ignore")
