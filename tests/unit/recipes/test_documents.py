"""Documents to indexed tokens: what is read, what is refused, and what Megatron reads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.errors import InputError
from conf.schema import DataConfig
from recipes.runtime.indexed_data import DataFolder
from recipes.runtime.tokenize import Lines, held_out, read_documents, tokenize

WORDS = ["<eos>", "alpha", "beta", "gamma", "delta"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", vocab_size=len(WORDS))


def write_model(folder: Path, vocab_size: int, eos: str | None = "<eos>") -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="alpha"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": vocab_size}))
    return folder


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_documents_come_back_as_megatron_reads_them(model: Path, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", {"text": "alpha beta"}, {"text": "gamma"}, {"text": "  "})
    validation = write_lines(tmp_path / "val.jsonl", {"text": "delta delta alpha"})
    folder, lines = tokenize(DataConfig(), [train], [validation], model, tmp_path)
    assert (lines.read, lines.empty, lines.bad) == (4, 1, 0)
    assert folder == DataFolder.read(tmp_path)
    assert folder.tokens(folder.train).tolist() == [1, 2, 0, 3, 0]
    assert folder.tokens(folder.validation).tolist() == [4, 4, 1, 0]
    assert (folder.train_documents, folder.train_tokens, folder.validation_tokens) == (2, 5, 4)
    assert folder.validation_bytes == len("delta delta alpha")
    assert folder.validation_sequences(2).tolist() == [[4, 4, 1]]
    assert folder.validation_sequences(9).shape == (0, 10)


def test_documents_are_cut_at_the_limit(model: Path, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", {"text": "alpha beta gamma"})
    folder, _ = tokenize(DataConfig(max_document_tokens=2), [train], [train], model, tmp_path)
    assert folder.tokens(folder.train).tolist() == [1, 2, 0]


def test_documents_are_held_out_by_their_text_alone(model: Path, tmp_path: Path) -> None:
    texts = [" ".join(np.random.default_rng(seed).choice(WORDS[1:], 8)) for seed in range(200)]
    train = write_lines(tmp_path / "train.jsonl", *({"text": text} for text in texts))
    folder, _ = tokenize(DataConfig(holdout_every=4), [train], None, model, tmp_path)
    assert folder.validation_documents == sum(held_out(text, 4) for text in texts)
    assert 25 < folder.validation_documents < 75  # 50 expected; 4 standard deviations are 25
    assert folder.train_documents + folder.validation_documents == 200


def test_broken_lines_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "x"}, "{oops", {"txt": "y"}, "[1]", {"text": 5})
    lines = Lines()
    assert list(read_documents([path], "text", lines)) == ["x"]
    assert (lines.read, lines.bad) == (5, 4)
    assert lines.first_bad is not None
    assert lines.first_bad.startswith(f"{path}, line 2: no JSON")


def test_too_many_broken_lines_fail(model: Path, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", {"text": "alpha"}, "{oops")
    with pytest.raises(InputError, match=r"1 of 3 lines are broken.*max_bad_share=0.001.*train.jsonl, line 2"):
        tokenize(DataConfig(), [train], [write_lines(tmp_path / "v.jsonl", {"text": "beta"})], model, tmp_path)
    assert not (tmp_path / "data.json").exists()


@pytest.mark.parametrize(
    ("vocab_size", "eos", "fault"),
    [
        (4, "<eos>", "gives token id 4, but the model's vocab_size is 4"),
        (5, None, "has no eos_token"),
    ],
)
def test_a_tokenizer_that_does_not_match_is_refused(
    tmp_path: Path, vocab_size: int, eos: str | None, fault: str
) -> None:
    model = write_model(tmp_path / "other", vocab_size, eos)
    train = write_lines(tmp_path / "train.jsonl", {"text": "alpha delta"})
    with pytest.raises(InputError, match=fault):
        tokenize(DataConfig(), [train], [train], model, tmp_path)


def test_a_split_without_documents_is_refused(model: Path, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", {"text": "alpha"})
    with pytest.raises(InputError, match="no validation documents.*holdout_every=1000000"):
        tokenize(DataConfig(holdout_every=1_000_000), [train], None, model, tmp_path)
    empty = write_lines(tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match="no training documents"):
        tokenize(DataConfig(), [empty], [train], model, tmp_path)


def test_the_demos_corpus_is_real_text_in_a_fixed_order() -> None:
    from recipes.runtime.demo_corpus import documents

    train, validation = documents()
    assert (train, validation) == documents()
    assert len(train) > 500
    assert not set(train) & set(validation)
    assert 0.04 < len(validation) / len(train) < 0.06
    assert sum(map(len, train)) > 2e6
