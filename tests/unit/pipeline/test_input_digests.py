"""User files are identified by content, which is only read again if size or times have changed."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from launch.planning.automatic import compose
from prune_distill.errors import ConfigError
from prune_distill.pipeline import input_digests
from prune_distill.pipeline.artifact import locate, remember_inputs
from prune_distill.pipeline.identity import fingerprints
from prune_distill.pipeline.input_digests import CACHE, digests, load_cache
from prune_distill.schema import RunConfig

Reads = Callable[[], list[str]]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Clear the cache, treat every file as settled, and return a function that lists newly read files."""
    read: list[str] = []
    digest = input_digests._Reading.digest

    def note(self: input_digests._Reading, path: str) -> str:
        read.append(os.path.basename(path))
        return digest(self, path)

    def list_new_reads() -> list[str]:
        names = sorted(read)
        read.clear()
        return names

    monkeypatch.setattr(input_digests._Reading, "digest", note)
    monkeypatch.setattr(input_digests, "SETTLED_NS", -(10**18))
    forget(monkeypatch)
    return list_new_reads


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset the records, as in a new process."""
    monkeypatch.setattr(input_digests, "_records", {})


def replace_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    time.sleep(0.02)  # a tick of the file system's clock
    path.write_bytes(content)


def test_digests_are_those_of_the_content_in_order(tmp_path: Path, reads: Reads) -> None:
    contents = [b"", b"a", bytes(3 * input_digests.BLOCK_BYTES + 1)]
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
    files = [tmp_path / name for name in ("2", "0", "1", "2")]
    assert digests(files) == [xxhash.xxh3_128_hexdigest(contents[n]) for n in (2, 0, 1, 2)]
    assert reads() == ["0", "1", "2"]
    assert digests([tmp_path / "1"]) == [xxhash.xxh3_128_hexdigest(b"a")]
    assert reads() == []


def test_edits_in_place_are_detected_despite_restored_times(tmp_path: Path, reads: Reads) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(12 << 20))
    (before,) = digests([path])
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    replace_byte(path, 5 << 20)
    os.utime(path, ns=times)
    assert digests([path]) != [before]
    replace_byte(path, 5 << 20)
    assert digests([path]) == [before]


def test_a_touched_or_copied_file_is_the_same(tmp_path: Path, reads: Reads) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"content")
    before = digests([path])
    os.utime(path, ns=(1, 1))
    shutil.copy(path, tmp_path / "b")
    assert digests([path]) == digests([tmp_path / "b"]) == before
    assert reads() == ["a", "a", "b"]


def test_recently_written_files_are_not_cached(tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_digests, "SETTLED_NS", 2 * 10**9)
    (tmp_path / "a").write_bytes(b"content")
    assert digests([tmp_path / "a"]) == digests([tmp_path / "a"])
    assert reads() == ["a", "a"]


def test_the_cache_serves_the_next_process(tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    known = digests([tmp_path / "a"])
    run_dir = tmp_path / "run"
    remember_inputs(run_dir)
    assert not run_dir.exists()
    run_dir.mkdir()
    remember_inputs(run_dir)
    forget(monkeypatch)
    load_cache(run_dir)
    known += digests([tmp_path / "b"])
    remember_inputs(run_dir)
    reads()
    forget(monkeypatch)
    load_cache(run_dir)
    before = (run_dir / CACHE).stat().st_ino
    assert digests([tmp_path / "a", tmp_path / "b"]) == known
    assert reads() == []
    remember_inputs(run_dir)
    assert (run_dir / CACHE).stat().st_ino == before  # nothing new: not written again


def damage(content: str) -> list[str]:
    ((*_, digest),) = json.loads(content)["files"].values()
    flipped = content.replace(digest, digest[:-1] + ("0" if digest[-1] != "0" else "1"))
    return ["", content[: len(content) // 2], "[]", "null", '{"files": 3}', flipped, "\x00" * 50, "[" * 10**5]


@pytest.mark.parametrize("number", range(8))
def test_a_damaged_cache_only_costs_time(
    tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "a").write_bytes(b"a")
    known = digests([tmp_path / "a"])
    remember_inputs(tmp_path)
    path = tmp_path / CACHE
    path.write_text(damage(path.read_text())[number])
    forget(monkeypatch)
    load_cache(tmp_path)
    reads()
    assert digests([tmp_path / "a"]) == known
    assert reads() == ["a"]
    remember_inputs(tmp_path)
    assert json.loads(path.read_text())["files"][str(tmp_path / "a")][3] == known[0]


@pytest.mark.timeout(20)
def test_special_files_are_rejected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model.safetensors is a pipe, socket or device"):
        fingerprints([tmp_path])
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"config.json cannot be read \(No such file"):
        fingerprints([tmp_path])


def own(tmp_path: Path) -> RunConfig:
    for name in ("model/tokenizer.json", "data/a.jsonl", "data/sub/b.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "run").mkdir()
    cfg = compose(["experiment=qwen3_8b_to_6b_depth", f"data.train=[{tmp_path}/data]", f"run_dir={tmp_path}/run"])
    cfg.model.hf_path = str(tmp_path / "model")
    return cfg


def test_the_identity_of_a_data_folder(tmp_path: Path, reads: Reads) -> None:
    cfg = own(tmp_path)

    def identity() -> str:
        return locate(cfg)["prepare_data"].config_hash

    before = identity()
    for name in ("README.md", ".a.jsonl", ".ipynb_checkpoints/a.jsonl", "model.bin"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text("not read as documents")
    assert identity() == before
    cfg.data.train = [*(cfg.data.train or []), f"{tmp_path}/data/../data"]
    assert identity() == locate(cfg)["prepare_data"].config_hash
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "model")
    assert identity() == identity()
    (tmp_path / "model" / "c.jsonl").write_text("{}")
    assert identity() != before


def test_a_stage_reads_nothing_that_the_launcher_read(
    tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = own(tmp_path)
    before = locate(cfg)["prepare_data"].config_hash
    assert reads() == ["a.jsonl", "b.jsonl", "tokenizer.json"]
    forget(monkeypatch)
    assert locate(cfg)["prepare_data"].config_hash == before
    assert reads() == []
    os.utime(tmp_path / "data" / "a.jsonl", ns=(1, 1))
    assert locate(cfg)["prepare_data"].config_hash == before
    assert reads() == ["a.jsonl"]


def test_progress_is_printed_from_time_to_time_by_the_first_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1e6
    monkeypatch.setattr(time, "monotonic", lambda: now)
    reading = input_digests._Reading(total=90_000_000_000)
    reading.done = 30_000_000_000
    lines = []
    # A line is due after the interval, and the next one an interval after that.
    for seconds in (1, input_digests.SECONDS_BETWEEN_LINES + 1, 1, input_digests.SECONDS_BETWEEN_LINES):
        now += seconds
        reading.report()
        lines.append(capsys.readouterr().err)
    monkeypatch.setenv("RANK", "1")
    now += 1000
    reading.report()
    assert capsys.readouterr().err == ""
    assert [bool(line) for line in lines] == [False, True, False, True]
    assert lines[1].startswith("reading new and changed inputs: 30.0 of 90.0 GB, ")
    # Twice the bytes are left as were read.
    elapsed = 2 + input_digests.SECONDS_BETWEEN_LINES
    assert f"{2 * elapsed / 60:,.1f} min left" in lines[1]
