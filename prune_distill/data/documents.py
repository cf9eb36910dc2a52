"""Convert records to texts by format: plain text, ids of another tokenizer, or chat messages."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from prune_distill.data.chat import ChatTemplate, Span
from prune_distill.data.encoder import byte_alphabet, token_bytes
from prune_distill.data.readers import Lines, Source, parse
from prune_distill.data.tokenizer import TokenizerSpec, transformers_tokenizer
from prune_distill.errors import InputError
from prune_distill.model.hf_tokenizer import ids_by_token
from prune_distill.schema import DocumentFormat, Learn

# Cluster of a document without one.
NO_CLUSTER = -1
# Other fields of a record that are read, by format.
MORE_FIELDS = {DocumentFormat.chat: ("tools",), DocumentFormat.ids: ("loss_mask",)}


class Document(NamedTuple):
    """A text and its metadata.

    Attributes:
        bytes: number of bytes in UTF-8.
        key: first 8 bytes of the text's SHA-256, by which documents are held out, sampled and deduplicated.
        learned: spans of characters with a loss; None: the whole text.
        ids, mask: the tokens of the text and which of them have a loss, where the record says so.
    """

    text: str
    bytes: int
    key: int
    cluster: int
    learned: tuple[Span, ...] | None = None
    ids: np.ndarray | None = None
    mask: np.ndarray | None = None


class Rendered(NamedTuple):
    """A text of a record, with the attributes of a `Document`.

    Attributes:
        other_fields: names of fields of its messages that only the chat template may know.
    """

    text: str
    learned: tuple[Span, ...] | None = None
    ids: np.ndarray | None = None
    mask: np.ndarray | None = None
    other_fields: frozenset[str] = frozenset()


# Converts the value of a field to at least one text; the record has the other fields. Raises: ValueError, with the
# reason.
Render = Callable[[Any, Mapping[str, Any]], list[Rendered]]


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
    source: Source,
    render: Render,
    keys: Sequence[str],
    cluster_key: str,
    keep: Callable[[int], bool],
    lines: Lines,
    digest: Any,
) -> Iterator[Document]:
    """Yield the documents of a source in order; all other records are counted in `lines`.

    Further documents of the same record have its key and no bytes, like the parts of a long document.

    Args:
        keys, cluster_key: fields of the document, of which a record has one, and of its cluster.
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
            value = _field(record, keys)
            # Several writers store a document without text as null.
            texts = [Rendered("")] if value is None else render(value, record)
            utf8 = "".join(rendered.text for rendered in texts).encode()
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
            key = _key(sha256)
            if not utf8 or utf8.isspace():
                lines.empty += 1
            elif not keep(key):
                lines.left_out += 1
            else:
                lines.documents += 1
                lines.count_fields(dict.fromkeys(texts[0].other_fields, 1))
                for number, (text, learned, ids, mask, _) in enumerate(texts):
                    yield Document(text, 0 if number else len(utf8), key, cluster, learned, ids, mask)


def _field(record: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """Return the first value of several fields that a record may have; None: it is null."""
    found = [record[key] for key in keys if key in record]
    if not found:
        raise ValueError(f"no field {' or '.join(map(repr, keys))}")
    return next((value for value in found if value is not None), None)


def _cluster(value: Any) -> int:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else NO_CLUSTER


def renderer(
    format: DocumentFormat,
    tokenizer: TokenizerSpec,
    source_tokenizer: TokenizerSpec | None,
    learn: Learn = Learn.all,
    split_turns: bool = False,
) -> Render:
    """Return the function that converts the field of a record to a text."""
    if format is DocumentFormat.text:
        return _text
    if format is DocumentFormat.tokens:
        assert source_tokenizer is not None
        return _Decoder(source_tokenizer)
    if format is DocumentFormat.ids:
        return _Ids(tokenizer)
    return _Chat(tokenizer, learn, split_turns)


def _text(value: Any, record: Mapping[str, Any]) -> list[Rendered]:
    if isinstance(value, bytes):  # from Parquet, where text is also stored as BINARY
        try:
            return [Rendered(value.decode())]
        except UnicodeDecodeError as error:
            raise ValueError(f"the document is not UTF-8 ({error})") from None
    if not isinstance(value, str):
        raise ValueError(f"the document is of type {type(value).__name__}, not a string")
    return [Rendered(value)]


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

    def __call__(self, value: Any, record: Mapping[str, Any]) -> list[Rendered]:
        try:
            content = b"".join(map(self._contents.__getitem__, value))
        except (KeyError, TypeError):
            raise ValueError("the document is not a list of the source tokenizer's ids") from None
        # Drops an incomplete character at the end.
        return [Rendered(codecs.getincrementaldecoder("utf-8")().decode(content))]


class _Chat:
    """Renders messages with the model's chat template."""

    def __init__(self, spec: TokenizerSpec, learn: Learn, split_turns: bool) -> None:
        self._template, self._learn, self._split_turns = ChatTemplate(spec.folder), learn, split_turns

    def __call__(self, value: Any, record: Mapping[str, Any]) -> list[Rendered]:
        texts = self._template.render(value, record.get("tools"), self._learn, self._split_turns)
        others = frozenset(self._template.other_fields(value))
        return [Rendered(text, learned, other_fields=others) for text, learned in texts]


class _Ids:
    """Reads ids of the model's own tokenizer, and which of them are learned."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self._vocab_size, self._decode = spec.vocab_size, transformers_tokenizer(spec.folder).decode

    def __call__(self, value: Any, record: Mapping[str, Any]) -> list[Rendered]:
        ids, mask = _integers(value), record.get("loss_mask")
        if ids is None or not ((ids >= 0) & (ids < self._vocab_size)).all():
            raise ValueError(f"the document is not a list of ids from 0 to {self._vocab_size - 1}")
        mask = np.ones(len(ids)) if mask is None else _integers(mask)
        if mask is None or mask.shape != ids.shape or not np.isin(mask, (0, 1)).all():
            raise ValueError(f"its field 'loss_mask' is not a list of {len(ids)} ones and zeros")
        text = self._decode(ids.tolist(), skip_special_tokens=False)
        return [Rendered(text, ids=ids.astype(np.uint32), mask=mask.astype(np.uint8))]


def _integers(value: Any) -> np.ndarray | None:
    """Return a list of integers as an array; None: it is something else."""
    if not isinstance(value, list) or not all(type(number) is int for number in value):
        return None
    return np.asarray(value, dtype=np.int64)


def learned_tokens(spans: tuple[Span, ...], offsets: np.ndarray) -> np.ndarray:
    """Return a mask `[tokens]` uint8 of the tokens within spans of characters, from their `offsets` `[tokens, 2]`."""
    mask = np.zeros(len(offsets), dtype=np.uint8)
    for start, end in spans:
        mask |= ((offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0])).astype(np.uint8)
    return mask
