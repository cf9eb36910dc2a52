"""Checks of a tokenizer's files before a run, without transformers, with one sentence per fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.planning.automatic import compose
from prune_distill.errors import ConfigError, InputError, reading
from prune_distill.model.hf_tokenizer import faults
from prune_distill.regular_files import is_lfs_pointer
from tests.helpers.hf_folders import complete
from tests.helpers.tokenizers import byte_level, sentencepiece_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 11422654\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = byte_level(tmp_path_factory.mktemp("saved"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(saved: dict[str, bytes], tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    for name, content in saved.items():
        (tmp_path / "model" / name).write_bytes(content)
    return tmp_path / "model"


def test_what_transformers_saved_has_no_faults(folder: Path) -> None:
    assert faults(folder) == []


@pytest.mark.parametrize(
    "names",
    [["tokenizer.json"], ["config.json", "model-00001-of-00002.safetensors"], ["tokenizer_config.json"]],
)
def test_git_lfs_pointers_are_named_once(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).write_text(POINTER)
    (fault,) = faults(folder)
    assert all(part in fault for part in (str(folder), ", ".join(names), "Git LFS", "git lfs pull"))


def test_files_that_are_not_read_may_be_pointers(folder: Path) -> None:
    for name in ("logo.png", "pytorch_model.bin", "consolidated.safetensors", "model.gguf", "README.md"):
        (folder / name).write_text(POINTER)
    assert faults(folder) == []


def test_pipes_are_not_opened(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    (fault,) = faults(folder)
    assert "has no tokenizer" in fault


@pytest.mark.parametrize(
    ("content", "pointer"),
    [(POINTER, True), ("version https://git-lfs.github.com/", False), ("", False), ('{"version": "1.0"}', False)],
)
def test_only_the_first_line_of_a_pointer_is_one(tmp_path: Path, content: str, pointer: bool) -> None:
    (tmp_path / "file").write_text(content)
    assert is_lfs_pointer(tmp_path / "file") is pointer
    assert not is_lfs_pointer(tmp_path)  # a folder
    assert not is_lfs_pointer(tmp_path / "nothing")


def newer_merges(text: str) -> str:
    content = json.loads(text)
    content["model"]["merges"] = [{"pair": merge} for merge in content["model"]["merges"]]
    return json.dumps(content)


@pytest.mark.parametrize("damage", [newer_merges, lambda text: text[:-100], lambda text: "", lambda text: "null"])
def test_a_tokenizer_json_that_the_library_cannot_read_is_named(folder: Path, damage: Callable[[str], str]) -> None:
    path = folder / "tokenizer.json"
    path.write_text(damage(path.read_text()))
    (fault,) = faults(folder)
    assert fault.startswith(f"{path} cannot be read (Exception: ")
    assert "download" in fault
    assert "\n" not in fault


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"[1, 2]", b"{", b'{"a": "\xff"}', b"[" * 100_000])
def test_side_files_are_json_objects(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    (fault,) = faults(folder)
    assert fault.startswith(f"{folder / name} cannot be read (")


def test_a_folder_without_a_tokenizer_says_what_is_needed(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (fault,) = faults(folder)
    assert str(folder) in fault
    assert "tokenizer.json" in fault
    assert "tekken" not in fault
    (folder / "tekken.json").write_text("{}")
    assert "tekken.json" in faults(folder)[0]
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_text("{}")
    assert faults(folder) == []


def test_tokenizer_model_is_of_sentencepiece_or_of_tiktoken(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path)
    path = tmp_path / "tokenizer.model"
    assert faults(tmp_path) == []
    path.write_bytes(path.read_bytes()[:2000])
    (fault,) = faults(tmp_path)
    assert fault.startswith(f"{path} cannot be read (")
    path.write_text("IQ== 0\nIg== 1\n")  # Llama 3's format, which transformers reads as well
    assert faults(tmp_path) == []


def test_a_run_with_a_faulty_tokenizer_does_not_start(folder: Path, tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    config |= {"num_attention_heads": 4, "vocab_size": 512, "max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    complete(folder)
    (folder / "tokenizer.json").write_text(POINTER)
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    overrides = ["model=local", "name=mine", f"model.hf_path={folder}", f"data.train=[{tmp_path / 'd.jsonl'}]"]
    overrides += ["model.family=llama", "prune.num_layers=2", "prune.calibration_seq_length=64"]
    overrides += ["evaluate.seq_length=64", "distill.seq_length=64", "distill.parallel.tensor_model_parallel_size=1"]
    compose(overrides)
    with pytest.raises(ConfigError) as caught:
        compose(overrides, check_files=True)
    assert all("Git LFS" in str(fault) for fault in caught.value.faults)


def test_library_errors_become_one_line(tmp_path: Path) -> None:
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    for error in (Exception("a\n  b"), panic("a\n  b"), RecursionError("a b"), SystemError("a b")):
        line = rf"^{tmp_path} cannot be read \({type(error).__name__}: a b\); fix it$"
        with pytest.raises(InputError, match=line), reading(tmp_path, "fix it"):
            raise error
    with pytest.raises(KeyboardInterrupt), reading(tmp_path, "fix it"):
        raise KeyboardInterrupt


def test_no_torch_and_no_transformers_are_imported(folder: Path) -> None:
    code = "import sys; from pathlib import Path; from prune_distill.model.hf_tokenizer import faults\n"
    code += "print(faults(Path(sys.argv[1])), "
    code += "sorted({'torch', 'transformers'} & set(sys.modules)), 'tokenizers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout == "[] [] True\n"
