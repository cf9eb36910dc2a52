"""Loaded tokenizers return the ids of the library that made them, for folders of any transformers version."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from prune_distill.data.hf_tokenizer import load_tokenizer
from prune_distill.data.tokenizer import read_tokenizer
from prune_distill.errors import InputError
from prune_distill.model.hf_tokenizer import ids_by_token
from tests.helpers.tokenizers import CHAT_TEMPLATE, TEXTS, byte_level, sentencepiece_model

HARD = [*TEXTS, "a  b   c ", "tab\tnew\n\nline", "汉\U0001f600 é ﬁ"]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def test_a_class_of_transformers_5_is_read_from_tokenizer_json(
    folder: Path, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(folder / "tokenizer_config.json", tokenizer_class="TokenizersBackend", backend="tokenizers", is_local=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with caplog.at_level(logging.WARNING, "recipes"):
        tokenizer = load_tokenizer(folder)
    assert "TokenizersBackend" in caplog.text
    own = load_tokenizer(saved)
    assert [tokenizer(text)["input_ids"] for text in HARD] == [own(text)["input_ids"] for text in HARD]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_files_prefix_space_is_kept_without_a_class(folder: Path) -> None:
    """transformers 4 would overwrite it with False, which it has in no file."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    edit(folder / "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    assert load_tokenizer(folder).tokenize("The")[0].startswith("Ġ")


def test_special_tokens_as_transformers_5_lists_them(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer = load_tokenizer(folder)
    assert tokenizer.additional_special_tokens == ["<|im_start|>", "<|im_end|>"]
    assert tokenizer("<|im_start|>", add_special_tokens=False)["input_ids"] == [1]
    assert len(tokenizer) == 400
    edit(folder / "tokenizer_config.json", model_specific_special_tokens={"image_token": "<|im_start|>"})
    assert load_tokenizer(folder).image_token == "<|im_start|>"


def test_unreadable_tokenizers_are_reported_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise Exception("untagged enum\nModelWrapper")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    assert load_tokenizer(folder).eos_token_id == 2
    (folder / "tokenizer.json").rename(folder / "aside")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_text("{}")
    with pytest.raises(InputError, match=rf"^{folder} cannot be read \(Exception: untagged enum ModelWrapper\); .*"):
        load_tokenizer(folder)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: False)
    with pytest.raises(InputError, match="none of its files contains a tokenizer"):
        load_tokenizer(folder)
    (folder / "aside").rename(folder / "tokenizer.json")
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"tokenizer\.json is a Git LFS pointer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("add_bos_token", [True, False])
def test_a_model_of_sentencepiece_gives_its_ids(tmp_path: Path, kind: str, legacy: bool, add_bos_token: bool) -> None:
    pieces = sentencepiece_model(tmp_path, kind, legacy=legacy, add_bos_token=add_bos_token)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.is_fast
    # Unless legacy, transformers does not add a space in front of an existing one.
    for text in [*HARD, *([" leading", "  two"] if legacy else [])]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text), text
        assert tokenizer(text)["input_ids"] == [*([1] if add_bos_token else []), *pieces.encode(text)], text
    assert tokenizer.eos_token_id == pieces.eos_id() == 2


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_model_of_sentencepiece_without_a_space_in_front(tmp_path: Path, kind: str) -> None:
    pieces = sentencepiece_model(tmp_path, kind, add_dummy_prefix=False, legacy=False, add_prefix_space=False)
    tokenizer = load_tokenizer(tmp_path)
    assert pieces.encode("The", out_type=str)[0] == "T"
    for text in HARD:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text), text


def test_documents_get_the_ids_of_sentencepiece(tmp_path: Path) -> None:
    from prune_distill.data.encoder import choose, make_encoder

    pieces = sentencepiece_model(tmp_path, legacy=False)
    spec = read_tokenizer(tmp_path)
    assert (spec.eod_token, spec.vocab_size) == (2, pieces.vocab_size())
    encode = make_encoder(spec, choose(spec)[0])
    assert [encode(text).tolist() for text in HARD] == [pieces.encode(text) for text in HARD]


def test_vocabularies_of_both_formats() -> None:
    assert ids_by_token({"model": {"vocab": {"a": 0, "b": 1}}}) == {"a": 0, "b": 1}
    assert ids_by_token({"model": {"vocab": [["a", 0.0], ["b", -1.5]]}}) == {"a": 0, "b": 1}
