"""Convert records to texts by format: plain text, ids of another tokenizer, or chat messages."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from prune_distill.data.encoder import byte_alphabet, token_bytes
from prune_distill.data.limits import LimitError, Limits
from prune_distill.data.readers import Lines, Source, parse
from prune_distill.data.tokenizer import TokenizerSpec, transformers_tokenizer
from prune_distill.errors import InputError
from prune_distill.model.hf_tokenizer import ids_by_token
from prune_distill.schema import DocumentFormat

# Cluster of a document without one.
NO_CLUSTER = -1
# Limits of a chat template per rendering of a conversation.
CHAT_SECONDS = 10.0
CHAT_BYTES = 2**30
# Maximum characters of the result: a constant (system prompt, tools) plus a multiple of the conversation's.
CHAT_OWN_CHARACTERS = 2**20
CHAT_SHARE = 64


class Document(NamedTuple):
    """A text and its metadata.

    Attributes:
        bytes: number of bytes in UTF-8.
        key: first 8 bytes of the text's SHA-256, by which documents are held out, sampled and deduplicated.
        learned: spans of characters with a loss; None: the whole text.
    """

    text: str
    bytes: int
    key: int
    cluster: int
    learned: tuple[tuple[int, int], ...] | None = None


# Converts the value of a field to a text and its learned spans. Raises: ValueError, with the reason.
Render = Callable[[Any], tuple[str, tuple[tuple[int, int], ...] | None]]


def document_key(utf8: bytes) -> int:
    return _key(hashlib.sha256(utf8).digest())


def _key(sha256: bytes) -> int:
    return int.from_bytes(sha256[:8], "big")


def held_out(key: int, every: int) -> bool:
    """Return whether a document belongs to validation. It depends only on the text, so added files change nothing."""
    return key % every == 0


def shuffle_key(key: Any, seed: int) -> Any:
    """Return a document's position in the random order of a seed, in [0, 2^64), for a key or an array of keys.

    The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) on keys that are already random.
    """
    mask = (1 << 64) - 1
    mixed = (key ^ (seed * 0x9E3779B97F4A7C15 & mask)) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return mixed ^ (mixed >> 31)


def documents(
    source: Source, render: Render, key: str, cluster_key: str, keep: Callable[[int], bool], lines: Lines, digest: Any
) -> Iterator[Document]:
    """Yield the documents of a source in order; all other records are counted in `lines`.

    Args:
        key, cluster_key: fields of the document and of its cluster.
        keep: returns whether to keep a document, by key.
        digest: updated with the SHA-256 of every text.
    """
    for value in source:
        lines.lines += 1
        if isinstance(value, bytes) and value.isspace():
            lines.empty += 1
            continue
        try:
            record = parse(value)
            if key not in record:
                raise ValueError(f"no field {key!r}")
            # Several writers store a document without text as null.
            text, learned = ("", None) if record[key] is None else render(record[key])
            utf8 = text.encode()
            cluster = _cluster(record.get(cluster_key))
        except UnicodeEncodeError:
            lines.count_invalid(source.where(), "half of a surrogate pair, which is not valid text")
        except InputError as fault:
            raise InputError(f"{source.where()}: {fault}") from fault
        except ValueError as reason:
            lines.count_invalid(source.where(), str(reason))
        else:
            sha256 = hashlib.sha256(utf8).digest()
            digest.update(sha256)
            document = Document(text, len(utf8), _key(sha256), cluster, learned)
            if not text or text.isspace():
                lines.empty += 1
            elif not keep(document.key):
                lines.left_out += 1
            else:
                lines.documents += 1
                yield document


def _cluster(value: Any) -> int:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else NO_CLUSTER


def renderer(
    format: DocumentFormat, tokenizer: TokenizerSpec, source_tokenizer: TokenizerSpec | None, mask_prompts: bool
) -> Render:
    """Return the function that converts the field of a record to a text."""
    if format is DocumentFormat.text:
        return _text
    if format is DocumentFormat.tokens:
        assert source_tokenizer is not None
        return _Decoder(source_tokenizer)
    return _Chat(tokenizer, mask_prompts)


def _text(value: Any) -> tuple[str, None]:
    if isinstance(value, bytes):  # from Parquet, where text is also stored as BINARY
        try:
            return value.decode(), None
        except UnicodeDecodeError as error:
            raise ValueError(f"the document is not UTF-8 ({error})") from None
    if not isinstance(value, str):
        raise ValueError(f"the document is {_kind(value)}, not a string")
    return value, None


class _Decoder:
    """Decodes token ids of a byte-level tokenizer."""

    def __init__(self, spec: TokenizerSpec) -> None:
        alphabet = byte_alphabet()
        tokenizer = spec.json
        contents = {number: token_bytes(token, alphabet) for token, number in ids_by_token(tokenizer).items()}
        special = {token["id"] for token in tokenizer.get("added_tokens", [])}
        if any(content is None for number, content in contents.items() if number not in special):
            raise InputError(
                f"data.source_tokenizer={spec.folder}: not a byte-level tokenizer; set one, such as "
                "openai-community/gpt2"
            )
        # Special tokens are not text.
        self._contents = {number: content or b"" for number, content in contents.items()} | dict.fromkeys(special, b"")

    def __call__(self, value: Any) -> tuple[str, None]:
        try:
            content = b"".join(map(self._contents.__getitem__, value))
        except (KeyError, TypeError):
            raise ValueError("the document is not a list of the source tokenizer's ids") from None
        # Drops an incomplete character at the end.
        return codecs.getincrementaldecoder("utf-8")().decode(content), None


class _Chat:
    """Renders messages with the model's chat template, which transformers runs in a sandbox.

    Raises:
        InputError: on a call, if the template reaches a limit. Other conversations would reach it too, so they are not
            counted as invalid.
    """

    def __init__(self, spec: TokenizerSpec, mask_prompts: bool) -> None:
        self._folder = spec.folder
        self._template = transformers_tokenizer(spec.folder).apply_chat_template
        self._mask_prompts = mask_prompts
        self._limits = Limits(CHAT_SECONDS, CHAT_BYTES)

    def __call__(self, value: Any) -> tuple[str, tuple[tuple[int, int], ...] | None]:
        if not isinstance(value, list) or not all(isinstance(message, dict) and "role" in message for message in value):
            raise ValueError(f"the document is {_kind(value)}, not a list of messages")
        if not value:
            return "", None
        try:
            text = self._render(value)
            return text, self._answers(value, text) if self._mask_prompts else None
        except LimitError as limit:
            raise InputError(
                f"the chat template in {self._folder} {limit} for one conversation; fix the template, or remove the"
                " conversation if it should not be that long"
            ) from limit
        except Exception as error:  # templates raise errors of any kind
            raise ValueError(f"the chat template rejects the messages ({error})") from error

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        with self._limits.applied():
            text: str = self._template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
            if len(text) > CHAT_OWN_CHARACTERS and len(text) > CHAT_OWN_CHARACTERS + CHAT_SHARE * len(repr(messages)):
                raise LimitError(f"writes {len(text):,} characters")
        return text

    def _answers(self, messages: list[dict[str, Any]], text: str) -> tuple[tuple[int, int], ...]:
        """Return the spans of the assistant's messages: from the end of the generation prompt to the end of the
        message.

        Some templates render a message differently when others follow (Qwen3 drops earlier thoughts). Such a
        conversation cannot be split into turns and is rejected.
        """
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], add_generation_prompt=True) if number else ""
            after = self._render(messages[: number + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError("the chat template does not render its turns one after the other")
            spans.append((len(before), len(after)))
        return tuple(spans)


def learned_tokens(spans: tuple[tuple[int, int], ...], offsets: np.ndarray) -> np.ndarray:
    """Return a mask `[tokens]` uint8 of the tokens within spans of characters, from their `offsets` `[tokens, 2]`."""
    mask = np.zeros(len(offsets), dtype=np.uint8)
    for start, end in spans:
        mask |= ((offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0])).astype(np.uint8)
    return mask


def _kind(value: Any) -> str:
    return f"of type {type(value).__name__}"
