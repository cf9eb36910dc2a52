"""Files of documents: records are read or counted as invalid, and nothing is lost silently."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from prune_distill.data import readers
from prune_distill.data.documents import Document, Rendered, documents, held_out, renderer, shuffle_key
from prune_distill.data.readers import Lines, Piece, Source, parse, split_file
from prune_distill.errors import InputError
from tests.helpers.tokenizers import byte_level

TEXTS = [f"Document {number} says {'é漢😀'[number % 3]} " * (1 + number % 7) for number in range(300)]


def write(path: Path, content: bytes) -> Path:
    """Write a file, compressed according to its name."""
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = pyarrow.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    return path


def lines_of(*records: Any) -> bytes:
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records)


def parquet(path: Path, **columns: list[Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=64)
    return path


def read(*pieces: Piece, key: str = "text", keep: Any = lambda key: True) -> tuple[list[Document], Lines]:
    lines = Lines()
    text = renderer(readers_format(), None, None)  # type: ignore[arg-type]
    found = list(
        documents(Source(list(pieces), (key, "cluster_id")), text, [key], "cluster_id", keep, lines, hashlib.sha256())
    )
    assert lines.lines == lines.documents + lines.empty + lines.bad + lines.left_out
    return found, lines


def readers_format() -> Any:
    from prune_distill.schema import DocumentFormat

    return DocumentFormat.text


def texts(*pieces: Piece) -> list[str]:
    return [document.text for document in read(*pieces)[0]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.ndjson"])
def test_lines_are_read_from_any_compression(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, lines_of(*({"text": text, "cluster_id": 3} for text in TEXTS)))
    found, lines = read(Piece(str(path)))
    assert [document.text for document in found] == TEXTS
    assert {document.cluster for document in found} == {3}
    assert [document.bytes for document in found] == [len(text.encode()) for text in TEXTS]
    assert (lines.lines, lines.bad) == (300, 0)


def test_a_last_line_without_an_end_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines_of({"text": "a"}, {"text": "b"})[:-1])
    assert texts(Piece(str(path))) == ["a", "b"]


@pytest.mark.parametrize("piece_bytes", [1, 7, 100, 1000, 100_000])
def test_pieces_of_a_file_cover_it(tmp_path: Path, piece_bytes: int) -> None:
    path = write(tmp_path / "a.jsonl", lines_of(*({"text": text} for text in TEXTS[:40])))
    pieces = [piece for piece, _ in split_file(str(path), piece_bytes)]
    assert [text for piece in pieces for text in texts(piece)] == TEXTS[:40]
    assert sum(size for _, size in split_file(str(path), piece_bytes)) == path.stat().st_size


def test_parquet_is_read_by_row_groups(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", other=list(range(300)), text=TEXTS, cluster_id=[n % 4 for n in range(300)])
    pieces = [piece for piece, _ in split_file(str(path), 5000)]
    assert len(pieces) > 1
    assert [text for piece in pieces for text in texts(piece)] == TEXTS
    assert [document.cluster for document in read(pieces[0])[0]][:5] == [0, 1, 2, 3, 0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{oops", "invalid JSON"),
        (b'{"text": "a"', "invalid JSON"),
        (b"[1]", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b"[" * 100_000, "invalid JSON"),
        (b'{"txt": "a"}', "no field 'text'"),
        (b'{"text": 5}', "of type int, not a string"),
        (b'{"text": ["a"]}', "of type list, not a string"),
        (b'{"text": "\xff"}', "invalid JSON ('utf-8' codec"),
        (b'{"text": "a\xc3"}', "invalid JSON ('utf-8' codec"),
        (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
    ],
)
def test_invalid_lines_are_counted_and_the_first_is_reported(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", lines_of({"text": "x"}, line, b"", {"text": " \n"}, {"text": "y"}, b"{"))
    found, lines = read(Piece(str(path)))
    assert [document.text for document in found] == ["x", "y"]
    assert (lines.lines, lines.bad, lines.empty) == (6, 2, 2)
    assert lines.first_bad is not None
    assert lines.first_bad.startswith(f"{path}, line 2: ")
    assert reason in lines.first_bad


@pytest.mark.parametrize(
    "line",
    [
        b'\xef\xbb\xbf{"text": "a"}',
        '{"text": "a"}'.encode("utf-16"),
        b'{"text": "a", "score": NaN}',
        b'{"text": "a", "id": 123456789012345678901234567890}',
        b'{"text": "b", "text": "a"}',
        b'{"text": "\\u0061", "note": "\\ud83d"}',
    ],
)
def test_json_is_accepted_as_in_python(tmp_path: Path, line: bytes) -> None:
    """Although a stricter library reads it."""
    assert json.loads(line)["text"] == "a"
    assert parse(line)["text"] == "a"


def test_an_invalid_line_is_reported_with_its_position(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines_of({"text": "x" * 50}, {"text": "y"}, b"{oops"))
    _, lines = read(Piece(str(path), 20, path.stat().st_size))
    assert lines.first_bad is not None
    at = int(lines.first_bad.removeprefix(f"{path}, byte ").partition(":")[0])
    assert path.read_bytes()[at:] == b"{oops\n"


def test_an_endless_line_is_not_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    path = write(tmp_path / "a.jsonl", lines_of({"text": "x"}, {"text": "long" * 2000}, {"text": "y"}))
    found, lines = read(Piece(str(path)))
    assert [document.text for document in found] == ["x", "y"]
    assert lines.bad == 1
    assert "longer than" in str(lines.first_bad)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("left", [1, 30, 0.5, 0.999])
def test_a_truncated_file_is_rejected(tmp_path: Path, name: str, left: float) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        parquet(path, text=TEXTS)
    else:
        write(path, lines_of(*({"text": text} for text in TEXTS)))
    content = path.read_bytes()
    path.write_bytes(content[: left if isinstance(left, int) else int(len(content) * left)])
    with pytest.raises(InputError, match=rf"{name}.*(truncated or corrupt|not a complete parquet file)"):
        [read(piece) for piece, _ in split_file(str(path), 10**9)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_file_of_no_bytes_or_of_nothing_holds_no_documents(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert texts(*(piece for piece, _ in split_file(str(tmp_path / name), 100))) == []
    write(tmp_path / name, b"")
    assert texts(Piece(str(tmp_path / name))) == []


def zstd_frames(*parts: bytes, window_log: int = 20) -> list[bytes]:
    """Make Zstandard frames of a stream with unknown size, so that the window has the given size."""
    from backports import zstd

    frames = []
    for part in parts:
        compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: window_log})
        frames.append(compressor.compress(part) + compressor.flush())
    return frames


def test_zstandard_with_skippable_frames_and_a_window_of_2_gib(tmp_path: Path) -> None:
    first, second = lines_of(*({"text": text} for text in TEXTS[:150])), lines_of(*({"text": t} for t in TEXTS[150:]))
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00" + b"size"  # as pzstd writes
    path = tmp_path / "a.jsonl.zst"
    frames = zstd_frames(first, second)
    path.write_bytes(skippable + frames[0] + skippable + frames[1] + skippable)
    assert texts(Piece(str(path))) == TEXTS
    path.write_bytes(skippable + frames[0] + skippable[:-1])
    with pytest.raises(InputError, match="truncated or corrupt"):
        read(Piece(str(path)))
    (frame,) = zstd_frames(first + second, window_log=31)
    # RFC 8878, 3.1.1.1.2: the exponent above 10 is in the upper 5 bits of the byte after magic and descriptor.
    assert frame[5] >> 3 == 31 - 10
    path.write_bytes(frame)
    assert texts(Piece(str(path))) == TEXTS


def test_null_is_an_empty_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines_of({"text": None}, {"text": "a"}, {"text": ""}))
    found, lines = read(Piece(str(path)))
    assert ([document.text for document in found], lines.empty, lines.bad) == (["a"], 2, 0)
    path = parquet(tmp_path / "a.parquet", text=[None, "a"])
    found, lines = read(Piece(str(path), 0, 1))
    assert ([document.text for document in found], lines.empty, lines.bad) == (["a"], 1, 0)


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "large_binary", "dictionary"])
def test_text_columns_of_parquet_of_any_type(tmp_path: Path, kind: str) -> None:
    values: Any = TEXTS if "binary" not in kind else [text.encode() for text in TEXTS]
    column = pyarrow.array(values, getattr(pyarrow, kind)() if kind != "dictionary" else None)
    if kind == "dictionary":
        column = column.dictionary_encode()
    path = parquet(tmp_path / "a.parquet", text=column)
    assert texts(*(piece for piece, _ in split_file(str(path), 5000))) == TEXTS


@pytest.mark.parametrize("valid", [True, False])
def test_a_parquet_row_that_is_not_utf8_is_one_invalid_row(tmp_path: Path, valid: bool) -> None:
    column = pyarrow.array([b"a", b"b\xff", b"c"])
    if not valid:  # a writer without checks
        column = pyarrow.StringArray.from_buffers(3, *column.buffers()[1:])
    path = parquet(tmp_path / "a.parquet", text=column)
    found, lines = read(Piece(str(path), 0, 1))
    assert ([document.text for document in found], lines.bad) == (["a", "c"], 1)
    assert lines.first_bad is not None
    assert "row 2" in lines.first_bad
    assert "not UTF-8" in lines.first_bad


@pytest.mark.parametrize("key", ["raw.text", "my text", "raw"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_keys_with_dots_and_spaces(tmp_path: Path, name: str, key: str) -> None:
    values = {"raw.text": "a", "my text": "b", "raw": "c"}
    path = tmp_path / name
    if name == "a.parquet":
        parquet(path, **{field: [value] for field, value in values.items()})
    else:
        write(path, lines_of(values))
    found, _ = read(Piece(str(path), 0, 1 if name == "a.parquet" else 0), key=key)
    assert [document.text for document in found] == [values[key]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_random_damage_is_rejected_or_counted(tmp_path: Path, name: str) -> None:
    """No crash, and nothing is lost silently: read + skipped = lines, which `read` asserts."""
    path = tmp_path / name
    refused = 0
    for seed in range(60):
        random.seed(seed)
        if name.endswith("parquet"):
            parquet(path, text=TEXTS)
        else:
            write(path, lines_of(*({"text": text} for text in TEXTS)))
        content = bytearray(path.read_bytes())
        for _ in range(random.choice([1, 5, 50])):
            at = random.randrange(len(content))
            content[at : at + random.choice([0, 1, 9])] = random.randbytes(random.choice([0, 1, 9]))
        path.write_bytes(content)
        try:
            for piece, _ in split_file(str(path), 10**9):
                read(piece)
        except InputError:
            refused += 1
    # Damage in plain text affects lines; the other formats have checksums or a structure that most damage breaks.
    assert refused == 0 if name == "a.jsonl" else refused > 30


def test_documents_are_held_out_and_sampled_by_their_text_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines_of(*({"text": text} for text in TEXTS)))
    keys = [document.key for document in read(Piece(str(path)))[0]]
    assert 45 < sum(held_out(key, 4) for key in keys) < 105  # 75 expected; 4 standard deviations are 30
    half, lines = read(Piece(str(path)), keep=lambda key: shuffle_key(key, 1) < 2**63)
    assert 115 < len(half) < 185  # 150 expected; 4 standard deviations are 35
    assert lines.left_out == 300 - len(half)
    again, _ = read(Piece(str(path)), keep=lambda key: shuffle_key(key, 2) < 2**63)
    assert again != half
    # Sampling and holding out are independent.
    assert 15 < sum(held_out(document.key, 4) for document in half) < 60  # 37.5 expected; 4 deviations are 21


def test_ids_of_another_tokenizer_are_decoded(tmp_path: Path) -> None:
    from prune_distill.data.encoder import TokenizersEncoder
    from prune_distill.data.tokenizer import read_tokenizer
    from prune_distill.schema import DocumentFormat

    spec = read_tokenizer(byte_level(tmp_path / "gpt2", style="gpt2"), model=False)
    encode = TokenizersEncoder(spec)
    decode = renderer(DocumentFormat.tokens, spec, spec)
    for text in TEXTS[:20]:
        ids = encode(text).tolist()
        assert decode(ids, {}) == [Rendered(text)]
        assert decode([*ids, 0], {}) == [Rendered(text)]  # <|endoftext|> is not text
    assert decode(encode("a漢").tolist()[:-1], {}) == [Rendered("a")]  # truncated within a character
    for bad in ("text", [10**6], None, [1.5], [[1]]):
        with pytest.raises(ValueError, match="not a list of the source tokenizer's ids"):
            decode(bad, {})
