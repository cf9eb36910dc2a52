"""Folders are written atomically, and nothing else is lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from convert.files import replace_folder
from prune_distill.errors import InputError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source" / "within").mkdir(parents=True)
    (tmp_path / "source" / "config.json").write_text("source")
    return tmp_path / "source"


def write(folder: Path, *sources: Path, error: BaseException | None = None) -> None:
    with replace_folder(folder, *sources) as partial:
        (partial / "config.json").write_text("new")
        if error is not None:
            raise error


def everything(folder: Path) -> dict[str, str | None]:
    return {str(path): path.read_text() if path.is_file() else None for path in folder.rglob("*")}


def test_a_folder_appears_complete(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with replace_folder(out, source) as partial:
        assert not out.exists()
        (partial / "config.json").write_text("new")
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "config.json").read_text() == "new"


@pytest.mark.parametrize("model", ["config.json", "context/io.json"])
def test_older_models_and_leftovers_are_replaced(tmp_path: Path, model: str) -> None:
    out = tmp_path / "out"
    (out / model).parent.mkdir(parents=True)
    (out / model).write_text("old")
    (tmp_path / ".partial.out").mkdir()
    (tmp_path / ".partial.out" / "half").touch()
    write(out)
    assert everything(tmp_path) == {str(out): None, str(out / "config.json"): "new"}


@pytest.mark.parametrize("error", [InputError("damaged"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_failure_does_not_change_the_folder(tmp_path: Path, source: Path, error: BaseException) -> None:
    before = everything(tmp_path)
    for out in (tmp_path / "out", source):
        with pytest.raises(type(error)):
            write(out, error=error)
    assert everything(tmp_path) == before


def test_a_link_is_followed(tmp_path: Path, source: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (source / "config.json").read_text() == "new"


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (lambda source: source, "must not contain each other"),
        (lambda source: source / "within" / "out", "must not contain each other"),
        (lambda source: source.parent, "must not contain each other"),
        (lambda source: Path("/"), "must not contain each other"),
        (lambda source: Path(".."), "must not contain each other"),  # from the folder within the source
        (lambda source: Path("."), "must not contain each other"),
        (lambda source: source.parent / "link", "must not contain each other"),
        (lambda source: source.parent / "file", "is a file"),
        (lambda source: source.parent / "file" / "out", r"cannot be written \(Not a directory\)"),
        (lambda source: source.parent / "mine", "would be replaced, but does not contain a model"),
        (lambda source: Path("/proc/out"), "cannot be written"),
        (lambda source: source.parent / ("x" * 250), r"cannot be written \(File name too long\)"),
    ],
)
def test_nothing_else_is_replaced(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, out: Callable[[Path], Path], message: str
) -> None:
    monkeypatch.chdir(source / "within")
    (tmp_path / "file").write_text("text")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "link").symlink_to(source)
    before = everything(tmp_path)
    with pytest.raises(InputError, match=message):
        write(out(source), source)
    assert everything(tmp_path) == before


def test_a_full_disk_raises_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command lines have their own message for it."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "out")
