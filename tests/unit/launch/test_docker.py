"""The `docker run` command of a run."""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import docker
from tests.helpers.hf_folders import hub_snapshot


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, and a cache of its own."""
    folder = tmp_path / "my work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for name in (*docker.PASSED_VARIABLES, "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return folder


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert docker.main(["--print", *arguments]) == 0
    return shlex.split(capsys.readouterr().out)


def values(words: list[str], option: str) -> list[str]:
    return [after for word, after in itertools.pairwise(words) if word == option]


def test_folders_are_mounted_at_their_own_paths(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = printed(capsys, "--", "experiment=demo", "run_dir=../out", "--until", "prune")
    assert (
        words[-7:]
        == [
            "nemo-prune-distill",
            "python",
            "-m",
            "launch.run",
            "experiment=demo",
            "run_dir=../out",
            "--until",
            "prune",
        ][-7:]
    )
    out = here.parent / "out"
    assert values(words, "--volume") == [f"{here.parent / 'cache'}:/huggingface", f"{here}:{here}", f"{out}:{out}"]
    assert values(words, "--workdir") == [str(here)]
    assert values(words, "--user") == [f"{os.getuid()}:{os.getgid()}"]
    assert values(words, "--gpus") == ["all"]
    assert {"--ipc=host", "--rm"} <= set(words)
    assert not out.exists()


def test_inputs_are_mounted_once_and_read_only(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = here.parent / "data"
    (data / "more").mkdir(parents=True)
    (here / "inside.jsonl").write_text("")
    for name in ("a.jsonl", "b.jsonl", "more/c.jsonl"):
        (data / name).write_text("")
    files = f"data.train=[inside.jsonl,{data}/a.jsonl,{data}/b.jsonl,{data}/more/c.jsonl]"
    words = printed(capsys, "--gpus", "none", "--", "experiment=demo", files)
    assert values(words, "--volume")[1:] == [f"{here}:{here}", f"{data}:{data}:ro"]
    assert values(words, "--gpus") == []


def test_a_run_folder_below_the_data_can_be_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = here.parent / "data"
    data.mkdir()
    (data / "a.jsonl").write_text("")
    words = printed(capsys, "--", "experiment=demo", f"data.train=[{data}/a.jsonl]", f"run_dir={data}/run")
    assert f"{data}/run:{data}/run" in values(words, "--volume")


def test_secrets_are_passed_by_name(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    words = printed(capsys, "--", "experiment=demo")
    assert "HF_TOKEN" in values(words, "--env")
    assert "hf_secret" not in " ".join(words)


def test_a_cache_of_its_own_is_mounted(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "../hub")
    words = printed(capsys, "--", "experiment=demo")
    hub = here.parent / "hub"
    assert f"{hub}:{hub}" in values(words, "--volume")
    assert f"HF_HUB_CACHE={hub}" in values(words, "--env")


def test_blobs_of_a_hub_snapshot_are_mounted(
    here: Path, capsys: pytest.CaptureFixture[str], hf_folder: Callable[..., Path]
) -> None:
    snapshot, blobs = hub_snapshot(hf_folder(), here.parent / "hub")
    (here / "docs.jsonl").write_text("")
    own = ["experiment=own", f"model.hf_path={snapshot}", "data.train=[docs.jsonl]", "prune.num_layers=2"]
    words = printed(capsys, "--", *own)
    assert {f"{snapshot}:{snapshot}:ro", f"{blobs}:{blobs}:ro"} <= set(values(words, "--volume"))


def test_a_folder_of_group_files_is_mounted_and_passed_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = here.parent / "site"
    (site / "cluster").mkdir(parents=True)
    (site / "cluster" / "mine.yaml").write_text("name: mine\nnuma_binding: node\n")
    words = printed(capsys, "--", "experiment=demo", "cluster=mine", "--config-dir", str(site))
    assert words[-4:] == ["experiment=demo", "cluster=mine", "--config-dir", str(site)]
    assert f"{site}:{site}:ro" in values(words, "--volume")
    assert "--cap-add=SYS_NICE" in words


def test_numa_binding_adds_the_capability_for_numactl(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    binding = "cluster.numa_binding=node"
    assert "--cap-add=SYS_NICE" in printed(capsys, "--", "experiment=demo", binding)
    assert "--cap-add=SYS_NICE" not in printed(capsys, "--gpus", "none", "--", "experiment=demo", binding)
    assert "--cap-add=SYS_NICE" not in printed(capsys, "--", "experiment=demo")


def test_faults_are_reported_before_docker_starts(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert docker.main(["--", "experiment=demo", "distill.lrr=1"]) == 2
    assert "distill.lrr: not a known key" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    assert docker.main(["--", "experiment=demo"]) == 2
    assert "docker not found" in capsys.readouterr().err
    assert os.listdir(here) == []
