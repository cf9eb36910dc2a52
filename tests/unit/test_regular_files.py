"""Files and links that a model's folder may contain."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.planning.automatic import compose
from prune_distill.errors import ConfigError, InputError
from prune_distill.model.huggingface import local_folder
from prune_distill.pipeline.identity import fingerprints
from prune_distill.regular_files import folder_faults
from tests.conftest import QWEN3

ROOT = Path(__file__).parents[3]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(QWEN3))
    (folder / "sub" / "b").write_text("b")
    return folder


def listen(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # the path of a socket must be short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: os.mkfifo(path), "a FIFO"),
        (listen, "a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "a character device"),
        (lambda path: path.symlink_to("/etc/hosts"), "it is a link to /etc/hosts, outside the model's folder"),
        (lambda path: path.symlink_to("../../outside"), "outside the model's folder"),
        (lambda path: path.symlink_to("/etc"), "it is a link to /etc, outside the model's folder"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
        (lambda path: path.symlink_to(path.name), "cannot be reached"),
    ],
)
def test_special_files_are_reported(model: Path, spoil: Callable[[Path], None], message: str) -> None:
    (model.parent / "outside").write_text("")
    assert folder_faults(model) == []
    spoil(model / "sub" / "x")
    (fault,) = folder_faults(model)
    assert fault.startswith(f"{model / 'sub' / 'x'}: ")
    assert message in fault
    with pytest.raises(InputError, match="sub/x"):
        local_folder(model, None, weights=False)


def test_links_that_may_be_followed(model: Path) -> None:
    (model / "inside").symlink_to("sub/b")
    (model / "folder").symlink_to("sub")
    linked = model.with_name("linked")
    linked.symlink_to(model)
    assert folder_faults(model) == folder_faults(linked) == []
    (model / "outside").symlink_to("/etc/hosts")
    assert folder_faults(model, allow_outside_links=True) == []
    assert len(folder_faults(linked)) == 1
    (model / "outside").rename(model / ".hidden")
    assert folder_faults(model) == []


def test_a_hub_cache_is_a_folder_of_links(tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0f3a"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "77").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/77")
    assert folder_faults(snapshot) == []
    (cache / "blobs" / "88").symlink_to("/etc/hosts")
    (snapshot / "b.json").symlink_to("../../blobs/88")
    assert "outside the model's folder" in folder_faults(snapshot)[0]


def test_a_fifo_does_not_hang(model: Path) -> None:
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    words = ["model=local", "data=jsonl", f"model.hf_path={model}"]
    command = f"from prune_distill.config.load import compose; compose({words})"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert f"{model / 'config.json'}: not a regular file" in done.stderr


def test_a_folder_with_special_files_has_no_identity(model: Path) -> None:
    os.mkfifo(model / "fifo")
    with pytest.raises(ConfigError, match="fifo is a pipe"):
        fingerprints([model])
    with pytest.raises(ConfigError, match="it is a FIFO"):
        compose(["model=local", "data=jsonl", f"model.hf_path={model}"], check_files=True)
