"""Prompts from files and from training documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prune_distill.data.folder import DataFolder
from prune_distill.data.shards import SplitWriter
from prune_distill.data.tokenizer import TokenizerSpec, read_tokenizer, transformers_tokenizer
from prune_distill.errors import InputError
from prune_distill.generation.prompts import Prompts, cut_prompts, read_prompts
from prune_distill.schema import OnPolicy
from tests.helpers.tokenizers import byte_level

CHAT = [
    {"role": "user", "content": "The quick brown fox"},
    {"role": "assistant", "content": "jumps"},
    {"role": "user", "content": "over the lazy dog"},
    {"role": "assistant", "content": "and does not mind"},
]


def settings(**values: Any) -> OnPolicy:
    return OnPolicy(
        **{"steps": 1, "lr": 1.0, "prompts_per_round": 10, "prompt_tokens": 4, "max_new_tokens": 8, **values}
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerSpec:
    return read_tokenizer(byte_level(tmp_path_factory.mktemp("tokenizer")))


def write(path: Path, *records: Any) -> list[str]:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines))
    return [str(path)]


def decode(tokenizer: TokenizerSpec, ids: list[int]) -> str:
    return str(transformers_tokenizer(tokenizer.folder).decode(ids))


def test_what_a_record_gives(tokenizer: TokenizerSpec, tmp_path: Path) -> None:
    """A whole prompt, the beginning of a document, or the conversation before the last answer."""
    question = "The quick brown fox jumps over the lazy dog, and the dog does not mind?"
    files = write(
        tmp_path / "p.jsonl", {"prompt": question}, {"text": question}, {"messages": CHAT}, {"messages": CHAT[:1]}
    )
    prompts = read_prompts(files, settings(), tokenizer, seed=1)
    texts = {decode(tokenizer, ids): len(ids) for ids in prompts.ids}
    asked = "<|im_start|>user\nThe quick brown fox<|im_end|>\n"
    conversation = f"{asked}<|im_start|>assistant\njumps<|im_end|>\n<|im_start|>user\nover the lazy dog<|im_end|>\n"
    whole = {question, f"{conversation}<|im_start|>assistant\n", f"{asked}<|im_start|>assistant\n"}
    (beginning,) = set(texts) - whole
    assert set(texts) == {*whole, beginning}
    assert question.startswith(beginning)
    assert texts[beginning] == 4


def test_records_without_a_prompt_are_counted(tokenizer: TokenizerSpec, tmp_path: Path) -> None:
    broken = ["{oops", {"question": "x"}, {"prompt": 5}, {"messages": CHAT[1:2]}, {"messages": "x"}]
    files = write(tmp_path / "p.jsonl", {"prompt": "fox"}, "", {"text": " "}, {"prompt": None, "text": "dog"}, *broken)
    lines = read_prompts(files, settings(), tokenizer, seed=1).lines
    assert (lines.lines, lines.documents, lines.empty, lines.bad) == (9, 2, 2, 5)
    assert lines.first_bad is not None
    assert "p.jsonl, line 5: invalid JSON" in lines.first_bad


def test_prompts_are_drawn_by_the_seed_whatever_the_order_of_the_records(
    tokenizer: TokenizerSpec, tmp_path: Path
) -> None:
    records = [{"prompt": f"number {number}"} for number in range(50)]
    files, reverse = write(tmp_path / "a.jsonl", *records), write(tmp_path / "b.jsonl", *records[::-1])
    drawn = read_prompts(files, settings(), tokenizer, seed=1).ids
    assert len(drawn) == 10
    assert read_prompts(reverse, settings(), tokenizer, seed=1).ids == drawn
    assert read_prompts(files, settings(), tokenizer, seed=2).ids != drawn


def test_messages_need_a_chat_template(tokenizer: TokenizerSpec, tmp_path: Path) -> None:
    plain = TokenizerSpec(tokenizer.folder, tokenizer.backend, tokenizer.eod_token, tokenizer.vocab_size, chat=False)
    with pytest.raises(InputError, match="no chat template"):
        read_prompts(write(tmp_path / "p.jsonl", {"messages": CHAT}), settings(), plain, seed=1)


def test_prompts_that_leave_no_room_for_a_completion_are_dropped() -> None:
    prompts = Prompts([[1] * 7, [2] * 8, [3] * 2])
    prompts.drop_too_long(settings(), seq_length=16)
    assert (prompts.ids, prompts.too_long) == ([[1] * 7, [3] * 2], 1)
    with pytest.raises(
        InputError, match=r"^distill\.on_policy\.prompts=None: no prompt is left of .* 2 with more than 1"
    ):
        prompts.drop_too_long(settings(), seq_length=10)
    with pytest.raises(InputError, match="no prompt is left of 0 records"):
        Prompts([]).drop_too_long(settings(), seq_length=16)


def folder(path: Path, documents: list[list[int]], masks: list[list[int]] | None = None) -> DataFolder:
    """Prepared training documents in two parts."""
    path.mkdir()
    parts = []
    for number, rows in enumerate((slice(None, 1), slice(1, None))):
        for suffix, content in (("", documents), ("_mask", masks)):
            if content is not None:
                writer = SplitWriter(path / f"{number}{suffix}", np.dtype(np.uint16), 100)
                for document in content[rows]:
                    writer.add([np.array(document)], (0, 0, 0))
                writer.finish()
        parts.append({"prefix": str(number), "source": "train", "documents": len(documents[rows])})
    return DataFolder(path, 100, 0, parts, 0, 0, 0, {}, {})


def test_the_beginnings_of_documents_are_prompts_if_something_follows(tmp_path: Path) -> None:
    documents = [[number] * (number + 3) + [0] for number in range(1, 5)]
    found = cut_prompts(folder(tmp_path / "data", documents), settings(), seed=1)
    # The first has four tokens and its end.
    assert sorted(found.ids) == [[2] * 4, [3] * 4, [4] * 4]
    few = cut_prompts(folder(tmp_path / "few", documents), settings(prompts_per_round=2), seed=1)
    assert few.ids == found.ids[:2]
    with pytest.raises(InputError, match=r"prompt_tokens=9: no training document is longer"):
        cut_prompts(folder(tmp_path / "short", documents), settings(prompt_tokens=9), seed=1)


def test_with_masks_the_prompt_is_what_comes_before_the_last_answer(tmp_path: Path) -> None:
    documents = [[1, 2, 3, 4, 5, 6, 7, 0], [1] * 7 + [0], [2] * 7 + [0]]
    masks = [[0, 0, 1, 1, 0, 1, 1, 1], [1] * 8, [0] * 8]
    found = cut_prompts(folder(tmp_path / "data", documents, masks), settings(), seed=1)
    # The second is all text, and in the third nothing is learned.
    assert sorted(found.ids) == [[1] * 4, [1, 2, 3, 4, 5]]
