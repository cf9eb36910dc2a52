"""Text to token ids: tiktoken where it is proven to give what the model's own tokenizer gives, and that one otherwise.

Both split text by the tokenizer's regular expression and merge bytes by rank; tiktoken takes about an eighth of the
time. It stands in for a byte-level BPE tokenizer whose `tokenizer.json` says nothing else than that. Texts that hold an
added token ("<|im_start|>") go to the model's tokenizer, which has its own rules for them, and so does a text that
tiktoken's regular expressions give up on (a million spaces).
"""

from __future__ import annotations

import logging
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from recipes.runtime.data.tokenizer import TokenizerSpec, transformers_tokenizer

log = logging.getLogger("recipes.encoder")

# GPT-2's, which the ByteLevel pre-tokenizer applies where it is not told otherwise
# (tokenizers, pre_tokenizers/byte_level.rs).
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Of code points outside the first plane one in so many is tried: all of them take 14 s, and gave no difference.
STRIDE = 61


class Encoder(Protocol):
    """Gives a text's token ids, `[tokens]` of an integer type, without any that begin or end a sequence."""

    name: str

    def __call__(self, text: str) -> np.ndarray: ...


class TokenizersEncoder:
    """The model's own tokenizer, through the library that transformers uses."""

    name = "tokenizers"

    def __init__(self, spec: TokenizerSpec) -> None:
        from tokenizers import Tokenizer

        assert spec.backend is not None
        self._tokenizer = Tokenizer.from_str(spec.backend)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and, of each, its first and last character: `[tokens]`, `[tokens, 2]`."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return np.asarray(encoding.ids, dtype=np.int64), offsets


class TransformersEncoder:
    """A tokenizer in Python, which the library has no twin of."""

    name = "transformers"

    def __init__(self, spec: TokenizerSpec) -> None:
        self._tokenizer = transformers_tokenizer(spec.folder)

    def __call__(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)


class TiktokenEncoder:
    """tiktoken with the merges and the pattern of a `tokenizer.json`.

    Raises:
        ValueError: the tokenizer is of another kind, with the reason.
    """

    name = "tiktoken"

    def __init__(self, spec: TokenizerSpec) -> None:
        import tiktoken

        ranks, self._ids = _ranks(spec.json)
        added = [token["content"] for token in spec.json.get("added_tokens", [])]
        self.own = TokenizersEncoder(spec)
        self._nfc = _normalises(spec.json)
        self._has_added = re.compile("|".join(map(re.escape, added)) or "(?!)").search
        # tiktoken looks for the added tokens, or for their common beginning where they have one, on its own way through
        # the text; ids from `_limit` on then say that it found some. With none at all it would try an empty pattern at
        # every character.
        beginning = os.path.commonprefix(added)  # noqa: RUF071
        needles = [beginning] if len(beginning) > 1 else added or ["<|endoftext|>"]
        self._limit = max(ranks.values()) + 1
        self._encode = tiktoken.Encoding(
            "tokenizer.json",
            pat_str=_pattern(spec.json),
            mergeable_ranks=ranks,
            special_tokens={needle: self._limit + number for number, needle in enumerate(needles)},
        )._core_bpe.encode_to_tiktoken_buffer
        self._needles = set(needles)

    def __call__(self, text: str) -> np.ndarray:
        if self._nfc and not text.isascii():
            composed = unicodedata.normalize("NFC", text)
            if composed is not text and self._has_added(text):
                return self.own(text)
        else:
            composed = text
        try:
            ids = np.frombuffer(self._encode(composed, self._needles), dtype=np.uint32)
            if len(ids) and ids.max() >= self._limit:
                if self._has_added(composed):
                    return self.own(text)
                ids = np.frombuffer(self._encode(composed, set()), dtype=np.uint32)
        except ValueError:  # "Max stack size exceeded for backtracking"
            return self.own(text)
        return ids if self._ids is None else self._ids[ids]


def make_encoder(spec: TokenizerSpec, name: str) -> Encoder:
    """The encoder of that name."""
    kinds: dict[str, Callable[[TokenizerSpec], Encoder]] = {
        kind.name: kind for kind in (TiktokenEncoder, TokenizersEncoder, TransformersEncoder)
    }
    return kinds[name](spec)


def choose(spec: TokenizerSpec) -> tuple[str, str]:
    """The fastest encoder that gives the tokenizer's ids, and why it is that one."""
    if spec.backend is None:
        return TransformersEncoder.name, "the tokenizer is written in Python"
    try:
        fast = TiktokenEncoder(spec)
    except ValueError as reason:
        return TokenizersEncoder.name, str(reason)
    tried = 0
    for text in hard_texts(spec):
        tried += 1
        if not np.array_equal(fast(text), fast.own(text)):
            return TokenizersEncoder.name, f"tiktoken gives other ids for {text[:40]!r}"
    return TiktokenEncoder.name, f"it gives the tokenizer's ids for all of {tried} hard texts"


def hard_texts(spec: TokenizerSpec) -> Iterator[str]:
    """Texts on which two tokenizers are apt to differ."""
    yield from _HARD
    points = [*range(0x3000), *range(0x3000, sys.maxunicode + 1, STRIDE)]
    letters = [chr(point) for point in points if not 0xD800 <= point < 0xE000]
    for start in range(0, len(letters), 512):
        some = letters[start : start + 512]
        # Each between letters, digits, marks and spaces, and doubled.
        yield "\n".join(f"a{letter}b 1{letter}!{letter} {letter}{letter}" for letter in some)
        yield unicodedata.normalize("NFD", "".join(some))
    for token in spec.json.get("added_tokens", [])[:64]:
        content = token["content"]
        yield f"a{content}b {content} \n{content}{content}\u0301 {content[:-1]}"
    vocabulary = list(_texts_of(spec.json["model"]["vocab"]))
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
    """The letters by which byte-level tokenizers write bytes (GPT-2's `bytes_to_unicode`)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{chr(byte): byte for byte in plain}, **{chr(256 + n): byte for n, byte in enumerate(others)}}


def token_bytes(token: str, alphabet: dict[str, int]) -> bytes | None:
    """The bytes that a byte-level token stands for; None where it is written otherwise."""
    try:
        return bytes(alphabet[letter] for letter in token)
    except KeyError:
        return None


def _texts_of(vocabulary: dict[str, int]) -> Iterator[str]:
    alphabet = byte_alphabet()
    for token in sorted(vocabulary, key=vocabulary.__getitem__):
        content = token_bytes(token, alphabet)
        if content is not None:
            yield content.decode("utf-8", "ignore")


def _ranks(tokenizer: dict[str, Any]) -> tuple[dict[bytes, int], np.ndarray | None]:
    """tiktoken's ranks of a byte-level BPE, and the id of each rank; None where the ids themselves serve as ranks."""
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"the tokenizer is no BPE ({model.get('type')})")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise ValueError(f"the tokenizer's BPE has a {key}")
    alphabet, vocabulary = byte_alphabet(), model["vocab"]
    if not set(alphabet) <= set(vocabulary):
        raise ValueError("the tokenizer's vocabulary does not hold all bytes")
    # In the order of merging; among single bytes, which nothing merges into, it does not matter.
    ids = {
        bytes([alphabet[token]]): vocabulary[token] for token in sorted(alphabet, key=lambda token: vocabulary[token])
    }
    last = None
    for merge in model["merges"]:
        token = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        content = token_bytes(token, alphabet)
        if content is None or token not in vocabulary:
            raise ValueError(f"the tokenizer's merge {merge} gives no token of bytes")
        if content in ids and content != last:
            raise ValueError(f"the tokenizer's merge {merge} gives a token that an earlier merge gives")
        ids[content] = vocabulary[token]
        last = content
    table = np.asarray(list(ids.values()), dtype=np.uint32)
    if (table[1:] > table[:-1]).all():
        return ids, None
    return {content: rank for rank, content in enumerate(ids)}, table


def _pattern(tokenizer: dict[str, Any]) -> str:
    """The regular expression by which a tokenizer splits text."""
    stage = tokenizer.get("pre_tokenizer") or {}
    if stage.get("type") == "ByteLevel" and not stage["add_prefix_space"] and stage.get("use_regex", True):
        return GPT2_PATTERN
    steps = stage.get("pretokenizers", [])
    if stage.get("type") == "Sequence" and [step["type"] for step in steps] == ["Split", "ByteLevel"]:
        split, byte_level = steps
        plain = split["behavior"] == "Isolated" and not split["invert"] and "Regex" in split["pattern"]
        if plain and not byte_level["add_prefix_space"] and not byte_level.get("use_regex", True):
            return str(split["pattern"]["Regex"])
    raise ValueError("the tokenizer does not split text by one regular expression into bytes")


def _normalises(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer brings text into Unicode's composed form (NFC)."""
    normaliser = tokenizer.get("normalizer")
    if normaliser is None or (normaliser["type"] == "Sequence" and not normaliser["normalizers"]):
        return False
    if normaliser["type"] != "NFC":
        raise ValueError(f"the tokenizer normalises text ({normaliser['type']})")
    return True
