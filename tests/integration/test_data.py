"""Data preparation through the real command lines: resumed, shared, checked, and read by training."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from prune_distill.pipeline.artifact import read_state
from tests.helpers import tiny
from tests.helpers.data_runs import command, folder_of, model_folder, resolved, texts, write


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and a config.json, without weights."""
    return model_folder(tmp_path_factory.mktemp("model"))


def run(arguments: list[str], check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(arguments, env=tiny.environment(), capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def check(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "recipes.prepare_data", "--check", str(folder), *more], check=False)


def content(folder: Path) -> dict[str, bytes]:
    names = ("data.json", "validation.bin", "validation.idx")
    paths = [*(folder / name for name in names), *sorted((folder / "shards").rglob("*"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


def test_files_of_all_kinds_become_a_checked_folder(model: Path, tmp_path: Path) -> None:
    documents = texts(300)
    write(tmp_path / "a.jsonl", documents[:100])
    write(tmp_path / "b.jsonl.gz", documents[100:200])
    pyarrow.parquet.write_table(pyarrow.table({"text": documents[200:], "n": range(100)}), tmp_path / "c.parquet")
    arguments = command(model, tmp_path / "run", f"data.train=[{tmp_path}/*.*]")
    run(arguments)
    folder = folder_of(arguments)
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
    assert (metrics["lines"], metrics["documents"], metrics["bad"]) == (300, 300, 0)
    assert metrics["train_documents"] + metrics["validation_documents"] == 300
    assert "prepare_data: complete, skipped" in run(arguments).stdout
    assert "nothing has changed" in check(folder).stdout
    shown = check(folder, "--document", "0").stdout
    assert shown.splitlines()[1] == f"{next(text for text in documents)}<|im_end|>"
    victim = folder / "shards" / "00000" / "train.bin"
    victim.write_bytes(b"\0\0" + victim.read_bytes()[2:])
    done = check(folder)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {folder}: {victim} has changed")


def test_after_a_faulty_file_is_fixed_only_its_shard_is_made(model: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", texts(100))
    whole = write(tmp_path / "b.jsonl.gz", texts(100, seed=1)).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(whole[:-20])
    arguments = command(model, tmp_path / "run", f"data.train=[{tmp_path}/*.*]", "data.shard_bytes=30000")
    done = run(arguments, check=False)
    assert done.returncode == 2
    assert f"{tmp_path}/b.jsonl.gz is truncated or corrupt" in done.stderr
    assert not list((tmp_path / "run").glob("*/data.json"))


@pytest.mark.usefixtures("real_start")
def test_a_run_killed_at_any_moment_resumes_with_the_same_bytes(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", texts(30_000))
    more = (f"data.train=[{source}]", "data.shard_bytes=500000")
    unbroken = command(model, tmp_path / "unbroken", *more)
    run(unbroken)
    arguments = command(model, tmp_path / "killed", *more)
    folder = folder_of(arguments)
    draw, complete = random.Random(7), []
    for _ in range(4):
        before = claims(folder)
        launcher = subprocess.Popen(
            [sys.executable, "-m", "recipes", "prepare_data", "--config", str(resolved(arguments))],
            env=tiny.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # Nothing is written during the first seconds.
        until = time.monotonic() + 60
        while claims(folder) <= before and launcher.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.8))
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
        complete.append(len(list(folder.glob("shards/0*"))))
    assert complete[0] < len(list(folder_of(unbroken).glob("shards/0*"))), (
        "the first kill came too late to show anything"
    )
    run(arguments)
    assert content(folder) == content(folder_of(unbroken))
    assert "nothing has changed" in check(folder).stdout


def claims(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("claims/*")}


def test_several_processes_share_the_shards_and_one_declares_them(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", texts(20_000))
    arguments = command(model, tmp_path / "run", f"data.train=[{source}]", "data.shard_bytes=300000")
    stage = [sys.executable, "-m", "recipes", "prepare_data", "--config", str(resolved(arguments))]
    processes = [
        subprocess.Popen(stage, env=tiny.environment(), stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    message = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], message
    folder = folder_of(arguments)
    assert (folder / "manifest.json").exists()
    assert "nothing has changed" in check(folder).stdout


def test_a_stop_file_pauses_preparation_and_the_same_command_resumes(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", texts(20_000))
    arguments = command(model, tmp_path / "run", f"data.train=[{source}]", "data.shard_bytes=100000")
    folder = folder_of(arguments)
    folder.mkdir(parents=True)
    launcher = subprocess.Popen(arguments, env=tiny.environment(), stderr=subprocess.PIPE, text=True)
    tiny.wait_for("shards/0*", folder, launcher)
    (folder / "stop").touch()
    _, message = launcher.communicate(timeout=300)
    assert launcher.returncode == 1
    assert "stage prepare_data is paused at step" in message
    state = read_state(folder)
    assert state["state"] == "paused"
    assert state["step"] == len(list(folder.glob("shards/0*"))) > 0
    run(arguments)
    assert "nothing has changed" in check(folder).stdout


def test_a_full_disk_is_reported_and_partial_files_are_not_used(
    model: Path, tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    source = write(tmp_path / "a.jsonl", texts(20_000))
    more = (f"data.train=[{source}]", "data.shard_bytes=2000000")
    arguments = command(model, small_disk("5m") / "run", *more)
    done = run(arguments, check=False)
    assert done.returncode == 2
    assert "no space left" in done.stderr
    folder = folder_of(arguments)
    assert not (folder / "data.json").exists()
    assert list(folder.glob("shards/.*")) == []
    small_disk("100m")
    run(arguments)
    assert "nothing has changed" in check(folder).stdout


def drawn(folder: Path, model: Path, length: int) -> dict[str, Any]:
    """Return the samples of a folder for training."""
    done = run([sys.executable, "-m", "tests.helpers.training_data", str(folder), str(model), str(length)])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_training_reads_a_blend_with_its_weights(model: Path, tmp_path: Path) -> None:
    """Two sources of the same size with one letter each give a third and two thirds of the sequences."""
    write(tmp_path / "x.jsonl", ["x" * 200] * 2000)
    write(tmp_path / "y.jsonl", ["y" * 200] * 2000)
    (tmp_path / "v.jsonl").write_text(
        '{"text": "held out, and long enough for a sequence of sixty-four tokens"}\n' * 99
    )
    sources = f"{{x: {{files: [{tmp_path}/x.jsonl], weight: 1}}, y: {{files: [{tmp_path}/y.jsonl], weight: 2}}}}"
    more = ("data.train=null", f"data.validation=[{tmp_path}/v.jsonl]", "data.shard_bytes=100000")
    arguments = command(model, tmp_path / "run", f"data.sources={sources}", *more)
    run(arguments)
    folder = folder_of(arguments)
    assert len(json.loads((folder / "data.json").read_text())["train"]) == 10
    tokens = np.asarray(drawn(folder, model, 64)["tokens"])
    vocab = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    share = {letter: (tokens == vocab[letter]).any(axis=1).mean() for letter in "xy"}
    # Whole sequences, and each of ten parts is rounded to them.
    assert share["x"] == pytest.approx(1 / 3, abs=0.01)
    assert share["y"] == pytest.approx(2 / 3, abs=0.01)


def test_training_only_learns_the_assistants_messages(model: Path, tmp_path: Path) -> None:
    chats = [
        [
            {"role": "user", "content": "xxx" * (number % 9 + 1)},
            {"role": "assistant", "content": "yy y" * (number % 7 + 1)},
        ]
        for number in range(400)
    ]
    source = write(tmp_path / "c.jsonl", chats, key="messages")
    more = ("data.format=chat", "data.learn=assistant", f"data.train=[{source}]")
    arguments = command(model, tmp_path / "run", *more)
    run(arguments)
    batch = {key: np.asarray(value) for key, value in drawn(folder_of(arguments), model, 64).items()}
    vocab = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    x, y = (batch["labels"] == vocab[letter] for letter in "xy")
    assert x.sum() > 500
    assert y.sum() > 500
    assert batch["loss_mask"][y].all()
    assert not batch["loss_mask"][x].any()
