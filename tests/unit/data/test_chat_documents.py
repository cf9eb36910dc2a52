"""Conversations and ids with masks as prepared documents: cut, dropped, counted, and split by turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from prune_distill.data import prepare as preparing
from prune_distill.data import work
from prune_distill.data.check import check_folder
from prune_distill.data.plan import VALIDATION, make_plan
from prune_distill.data.prepare import needs_masks, prepare
from prune_distill.data.shards import read_documents
from prune_distill.data.tokenizer import TokenizerSpec, _read
from prune_distill.errors import InputError
from prune_distill.schema import DataConfig, DocumentFormat, Learn, LongDocuments
from recipes.prepare_data import describe_losses
from tests.helpers.tokenizers import byte_level, chat_template

Document = tuple[list[int], list[int]]
USER = {"role": "user", "content": "The quick brown fox jumps over the lazy dog"}
ANSWER = {"role": "assistant", "content": "fox " * 20}
CHAT = DocumentFormat.chat


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TokenizerSpec:
    folder = byte_level(tmp_path_factory.mktemp("model"))
    chat_template(folder, "qwen3")
    return _read(str(folder), model=True)


Shard = tuple[list[Document], dict[str, Any]]


@pytest.fixture
def make(spec: TokenizerSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Shard]:
    """Prepare records, or a file, as one shard in this process; return its documents and its counts of lines."""

    def made(records: list[Any] | Path, **settings: Any) -> Shard:
        path = records if isinstance(records, Path) else write(tmp_path / "records.jsonl", records)
        data = DataConfig(**{"format": CHAT, "learn": Learn.assistant, **settings})
        (shard,) = make_plan(data, {VALIDATION: [str(path)]}, spec, None, 1)
        masked = needs_masks(data, [shard])
        monkeypatch.setattr(work, "_settings", work.Settings(data, 1, spec, None, 0, masked), raising=False)
        monkeypatch.setattr(work, "_renders", {})
        out = tmp_path / "shard"
        manifest = work.make_shard(shard, out, "tokenizers").manifest
        ids = list(read_documents(out / VALIDATION)) if manifest[VALIDATION]["documents"] else []
        masks = read_documents(out / f"{VALIDATION}_mask") if ids and masked else [np.ones(len(part)) for part in ids]
        pairs = [(part.tolist(), mask.tolist()) for part, mask in zip(ids, masks, strict=True)]
        return pairs, {**manifest["lines"], "bytes": manifest[VALIDATION]["bytes"]}

    return made


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def counts(lines: dict[str, Any]) -> tuple[int, int]:
    """Return how many documents were too long, and how many were dropped."""
    return lines["too_long"], lines["dropped"]


def test_long_conversations_are_cut_or_dropped(spec: TokenizerSpec, make: Callable[..., Shard]) -> None:
    records = [{"messages": [USER, ANSWER]}, {"messages": [{**USER, "content": "dog " * 300}, ANSWER]}]
    whole, lines = make(records)
    assert counts(lines) == (0, 0)
    (ids, mask), (long, _) = whole
    start, size = mask.index(1), lines["bytes"]
    # Qwen3 ends a turn with the end-of-document token and a newline; the one that ends the document is not learned.
    assert ids[-3:] == [spec.eod_token, ids[-2], spec.eod_token]
    assert mask == [0] * start + [1] * (len(ids) - start - 1) + [0]
    limit = start + 5
    cut, lines = make(records, max_document_tokens=limit)
    # The long prompt fills the limit, so that nothing of its answer is left.
    assert counts(lines) == (2, 1)
    assert cut == [([*ids[:limit], spec.eod_token], [0] * start + [1] * 5 + [0])]
    dropped, lines = make(records, max_document_tokens=len(ids), long_documents=LongDocuments.drop)
    assert (counts(lines), dropped) == ((1, 1), [(ids, mask)])
    parts, lines = make(records, max_document_tokens=limit, long_documents=LongDocuments.split)
    assert counts(lines) == (2, 0)
    assert all(any(part) for _, part in parts)
    assert parts[0] == (ids[:limit], mask[:limit])
    # Parts of the long prompt are not kept; its bytes are counted with the first part that is.
    assert sum(len(part) for part, _ in parts) < len(ids) + len(long)
    assert lines["bytes"] == size
    everything, lines = make(records, max_document_tokens=limit, learn=Learn.all)
    assert counts(lines) == (2, 0)
    assert [len(part) for part, _ in everything] == [limit + 1] * 2
    nothing, lines = make(records, max_document_tokens=5)
    assert (counts(lines), nothing) == ((2, 2), [])


def test_ids_keep_their_masks(spec: TokenizerSpec, make: Callable[..., Shard]) -> None:
    eod, ids = spec.eod_token, [10, 11, 12, 13]
    settings = {"format": DocumentFormat.ids, "learn": Learn.all}
    records = [
        {"tokens": ids, "loss_mask": [0, 0, 1, 1]},
        {"tokens": [*ids, eod], "loss_mask": [0, 0, 1, 1, 1]},
        {"tokens": ids},
        {"tokens": []},
    ]
    made, lines = make(records, **settings)
    # A mask says all that is learned: a generation that stopped at its limit has no end to learn.
    assert made == [
        ([*ids, eod], [0, 0, 1, 1, 0]),
        ([*ids, eod], [0, 0, 1, 1, 1]),
        ([*ids, eod], [1, 1, 1, 1, 0]),
    ]
    assert (lines["documents"], lines["empty"]) == (3, 1)
    for bad, reason in (
        ({"tokens": [10, 10**6]}, "not a list of ids from 0 to"),
        ({"tokens": [10, True]}, "not a list of ids"),
        ({"tokens": "text"}, "not a list of ids"),
        ({"tokens": ids, "loss_mask": [1]}, "'loss_mask' is not a list of 4 ones and zeros"),
        ({"tokens": ids, "loss_mask": [0, 0, 1, 2]}, "'loss_mask' is not a list of 4 ones and zeros"),
        ({"messages": []}, "no field 'tokens'"),
    ):
        with pytest.raises(InputError, match=reason):
            make([bad], **settings)


def test_parquet_and_json_lines_are_read_alike(spec: TokenizerSpec, make: Callable[..., Shard], tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": '{"at": "fox"}'}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "red"}]
    tools = json.dumps([{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}])
    conversations = [[*messages, ANSWER], [USER, ANSWER]]
    expected, _ = make([{"conversations": conversations[0], "tools": tools}, {"conversations": conversations[1]}])
    for column in (conversations, [json.dumps(conversation) for conversation in conversations]):
        path = tmp_path / "records.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"conversations": column, "tools": [tools, None]}), path)
        assert make(path)[0] == expected
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    with pytest.raises(InputError, match="has no column 'messages', only text"):
        make(path)


def test_what_is_not_read_is_counted_and_logged(make: Callable[..., Shard]) -> None:
    records = [{"messages": [USER, {**ANSWER, "thinking": "fox", "id": 3, "name": None}]}, {"messages": [USER]}]
    made, lines = make([*records, {"messages": [USER, ANSWER]}], max_invalid_fraction=0.5, max_document_tokens=60)
    assert len(made) == 2
    assert lines["other_fields"] == {"thinking": 1, "id": 1}
    assert list(describe_losses(lines, DataConfig(max_document_tokens=60))) == [
        f"1 of 3 lines are invalid (the first: {lines['first_bad']})",
        "2 documents are longer than data.max_document_tokens=60 (data.long_documents=truncate)",
        "messages have fields that a chat template may not read: id in 1 conversations, thinking in 1 conversations",
    ]


def test_turns_as_documents_are_parts_of_one(
    spec: TokenizerSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "read_tokenizer", lambda folder: spec)
    thinking = {**ANSWER, "content": "dog", "reasoning_content": "The quick fox"}
    record = {"messages": [USER, thinking, USER, thinking]}
    files = [str(write(tmp_path / "records.jsonl", [record, record]))]
    data = DataConfig(format=CHAT, learn=Learn.assistant, split_turns=True, deduplicate=True, num_workers=1)
    folder = prepare(data, {"train": files, VALIDATION: files}, Path(spec.folder), tmp_path / "out", 1)
    check_folder(folder.folder)
    prefix = folder.folder / folder.train[0]["prefix"]
    first, second = read_documents(prefix)
    masks = [mask.tolist() for mask in read_documents(Path(f"{prefix}_mask"))]
    assert folder.lines["documents"] == 4
    # Both have the whole thought, once.
    starts = [mask.index(1) for mask in masks]
    assert first[starts[0] :].tolist() == second[starts[1] :].tolist()
    assert [sum(mask) for mask in masks] == [len(first) - starts[0] - 1] * 2
