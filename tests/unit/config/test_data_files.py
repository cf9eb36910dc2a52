"""Files of a data section: hidden files, brackets, links, and files without documents."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.planning.automatic import compose
from prune_distill.config.data_files import document_files, drop_duplicates, files_below, find_existing, unreadable
from prune_distill.errors import ConfigError
from tests.helpers.faults import check_fault


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "a"}\n')


def names(paths: Sequence[str], folder: Path) -> list[str]:
    return [os.path.relpath(path, folder) for path in paths]


HIDDEN = ("._a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "sub/.b.jsonl", "sub/.cache/b.jsonl")


@pytest.mark.parametrize("pattern", [".", "*.jsonl", "**/*.jsonl", "**", "*", "{}"])
def test_hidden_files_are_not_data(data: Path, pattern: str) -> None:
    make(data, "a.jsonl", "sub/b.jsonl", *HIDDEN)
    found = drop_duplicates(document_files(find_existing(str(data) if pattern == "{}" else str(data / pattern))))
    expected = ["a.jsonl"] if pattern == "*.jsonl" else ["a.jsonl", "sub/b.jsonl"]
    assert sorted(map(os.path.realpath, found)) == [str(data / name) for name in expected]


def test_explicit_hidden_names_are_read(data: Path) -> None:
    make(data, *HIDDEN)
    assert find_existing(str(data / ".ipynb_checkpoints" / "*.jsonl")) == [str(data / HIDDEN[1])]
    assert document_files(find_existing(str(data / HIDDEN[0]))) == [str(data / HIDDEN[0])]
    assert document_files([str(data / "sub" / ".cache")]) == [str(data / HIDDEN[3])]


def test_existing_paths_are_not_patterns(data: Path) -> None:
    make(data, "part[1].jsonl", "part1.jsonl", "part2.jsonl", "[v1]/a.jsonl", "[v1]/b*.jsonl", "[v1]/bc.jsonl")
    for pattern, expected in {
        "part[1].jsonl": ["part[1].jsonl"],
        "part[12].jsonl": ["part1.jsonl", "part2.jsonl"],
        "[v1]": ["[v1]"],
        "[v1]/*.jsonl": ["[v1]/a.jsonl", "[v1]/b*.jsonl", "[v1]/bc.jsonl"],
        "[v1]/b*.jsonl": ["[v1]/b*.jsonl"],
        "[v1]/**/a.jsonl": ["[v1]/a.jsonl"],
        "[v2]/*.jsonl": [],
    }.items():
        assert names(find_existing(str(data / pattern)), data) == expected


def test_relative_patterns(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(data, "a.jsonl", "sub/b.jsonl")
    monkeypatch.chdir(data)
    assert find_existing("*.jsonl") == ["a.jsonl"]
    assert find_existing("sub/*") == ["sub/b.jsonl"]
    assert names(find_existing("**/*.jsonl"), Path()) == ["a.jsonl", "sub/b.jsonl"]
    assert names(document_files(["."]), Path()) == ["a.jsonl", "sub/b.jsonl"]


def test_linked_folders_are_followed_and_read_once(data: Path, tmp_path: Path) -> None:
    make(data, "a.jsonl", "sub/b.jsonl")
    make(tmp_path / "elsewhere", "c.jsonl")
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "zagain").symlink_to(tmp_path / "elsewhere")
    # 2^40 paths, if loops were followed.
    (data / "loop").symlink_to(data)
    (data / "sub" / "loop").symlink_to(data)
    expected = ["a.jsonl", "linked/c.jsonl", "sub/b.jsonl"]
    assert names(files_below(str(data)), data) == expected
    assert names(find_existing(str(data / "**" / "*.jsonl")), data) == expected


def test_a_file_that_is_named_twice_is_kept_once(data: Path) -> None:
    make(data, "a.jsonl", "b.jsonl")
    (data / "link.jsonl").symlink_to("a.jsonl")
    os.link(data / "b.jsonl", data / "hard.jsonl")
    paths = [str(data / name) for name in ("link.jsonl", "b.jsonl", "a.jsonl", "hard.jsonl", "b.jsonl")]
    assert drop_duplicates([*paths, f"{data}/../data/a.jsonl", "absent"]) == [paths[0], paths[1], "absent"]


def test_a_folder_that_cannot_be_listed_is_not_skipped(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(data, "a.jsonl", "sub/b.jsonl")
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match=r"data/sub: cannot be listed \(Permission denied\)"):
        files_below(str(data))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", None, "is a pipe, socket or device"),
        ("a.parquet", None, "is a pipe, socket or device"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        ("a.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        ("a.json", b' [\n{"text": "a"}]', "JSON array"),
        ("a.parquet", b"", "not a parquet file"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfe", "not a zst file"),
        ("a.jsonl", b"", None),
        ("a.jsonl.gz", b"", None),
        ("a.jsonl.zst", b"", None),
        ("a.jsonl.zst", b"\x50\x2a\x4d\x18\x04\x00\x00\x00", None),
        ("a.jsonl.zst", b"\x5f\x2a\x4d\x18\x04\x00\x00\x00", None),
    ],
)
def test_files_that_hold_no_documents(tmp_path: Path, name: str, content: bytes | None, reason: str | None) -> None:
    path = tmp_path / name
    os.mkfifo(path) if content is None else path.write_bytes(content)
    found = unreadable(str(path))
    assert found is None if reason is None else found is not None and reason in found


@pytest.mark.parametrize("name", ["b.jsonl", "folder"])
def test_a_link_to_nothing_is_rejected(data: Path, name: str) -> None:
    make(data, "a.jsonl", "README.md")
    (data / name).symlink_to("nowhere")
    assert names(document_files([str(data)]), data) == ["a.jsonl", name]
    assert "cannot be read (No such file or directory)" in (unreadable(str(data / name)) or "")


def test_validation_files_are_not_training_files_under_another_name(data: Path) -> None:
    make(data, "train/a.jsonl", "train/v.jsonl", "t.jsonl")
    (data / "link.jsonl").symlink_to("train/v.jsonl")
    setting = ["experiment=qwen3_8b_to_6b_width", f"data.train=[{data}/train/*.jsonl]"]
    overrides = [*setting, f"data.validation=[{data}/link.jsonl]"]
    check_fault(overrides, "data.leak", "data.train", "set data.validation=null", check_files=True)
    compose([*setting, f"data.validation=[{data}/t.jsonl]"], check_files=True)
