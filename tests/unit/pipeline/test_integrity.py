"""Records of folders, detection of damage, and the checkpoint from which a training resumes."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prune_distill.errors import InputError
from prune_distill.pipeline import outputs
from prune_distill.pipeline.artifact import Located, locate, read_manifest, update_record, write_json, write_manifest
from prune_distill.pipeline.integrity import (
    Damage,
    checkpoint_damage,
    damaged_inputs,
    describe_unrecorded,
    find_damage,
    raise_if_damaged,
)
from prune_distill.pipeline.names import OUTPUTS, find_checkpoints
from prune_distill.pipeline.outputs import digests, list_files, list_outputs, parse_record, select, select_share
from prune_distill.schema import RunConfig
from prune_distill.training.checkpoints import resume_point, select_superfluous
from tests.helpers import corruption

Compose = Callable[..., RunConfig]

RESULTS = {
    "nemo/weights/.metadata": b"index",
    "nemo/weights/__0_0.distcp": b"0" * 9000,
    "nemo/weights/__0_1.distcp": b"1" * 9000,
    "nemo/context/model.yaml": b"a: 1",
    "blocks.json": b"{}",
    "winner/checkpoints/step=4/weights/__0_0.distcp": b"w",
}
OTHERS = (
    *("log.txt", "log-node1.txt", "log.3.txt", "state.json", "stop", "stop.2", "began", ".lock", "measured/.lock"),
    *("checkpoints/step=2/weights/__0_0.distcp", ".partial.step=4/weights/x", "tensorboard/events.out", "claims/3.1"),
    *("a/tensorboard/events.out", "index_mapping/a.npy", "recovery/step=2/x", ".manifest.json.x7"),
)


def fill(folder: Path, files: dict[str, bytes] | tuple[str, ...]) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(files[name] if isinstance(files, dict) else b"x")


@pytest.fixture
def complete_stages(demo: Compose) -> dict[str, Located]:
    """The stages of a run with complete `prune` and `prepare_data`."""
    located = locate(demo())
    fill(located["prune"].folder, {**RESULTS, **dict.fromkeys(OTHERS, b"x")})
    fill(located["prepare_data"].folder, {"data.json": b"{}", "shards/0/train.bin": b"\1\2"})
    for name in ("prune", "prepare_data"):
        write_manifest(located[name], 1.0, 2.0, {"kept_layers": [1, 2], "by_layer": {2: 0.5, 10: (1, float("nan"))}})
    return located


def test_only_results_are_recorded(complete_stages: dict[str, Located]) -> None:
    folder = complete_stages["prune"].folder
    assert list_outputs(folder) == sorted(RESULTS)
    record = json.loads((folder / OUTPUTS).read_text())
    assert record == {
        name: {"size": len(content), "crc32": f"{zlib.crc32(content):08x}"} for name, content in RESULTS.items()
    }
    manifest = read_manifest(folder) or {}
    assert (manifest["outputs"]["files"], manifest["outputs"]["bytes"]) == (6, sum(map(len, RESULTS.values())))
    assert find_damage(folder) is None
    # Metrics of a training are a result; those of shared work may still grow.
    for name, recorded in (("prune", False), ("distill", True)):
        fill(complete_stages[name].folder, {"metrics.jsonl": b"{}"})
        write_manifest(complete_stages[name], 1.0, 2.0, {})
        assert ("metrics.jsonl" in json.loads((complete_stages[name].folder / OUTPUTS).read_text())) is recorded
    for name in OTHERS:
        (folder / name).unlink()
    assert find_damage(folder) is None


@pytest.mark.parametrize("damage", corruption.DAMAGES)
@pytest.mark.parametrize("name", [*RESULTS, "outputs.json", "manifest.json"])
def test_every_damage_is_detected(complete_stages: dict[str, Located], tmp_path: Path, name: str, damage: Any) -> None:
    folder = complete_stages["prune"].folder
    with corruption.damage_file(folder / name, damage, tmp_path / "aside"):
        if complete_stages["prune"].complete:
            found = find_damage(folder)
            assert found is not None
            assert list(found.files) == [name]
        else:
            assert name == "manifest.json"
    assert find_damage(folder) is None


def test_a_changed_figure_in_a_manifest_is_damage(complete_stages: dict[str, Located]) -> None:
    folder = complete_stages["prune"].folder
    path = folder / "manifest.json"
    content = path.read_text()
    path.write_text(content.replace('"kept_layers": [\n   1,', '"kept_layers": [\n   3,'))
    assert path.read_text() != content
    assert complete_stages["prune"].complete
    assert "manifest.json has other content" in str(find_damage(folder))
    # The keys of checksums must not be renamed.
    for key in ("outputs", "crc32"):
        path.write_text(content.replace(f'\n "{key}"', '\n "other"'))
        assert complete_stages["prune"].complete
        assert "manifest.json has other content" in str(find_damage(folder))


def test_sizes_are_compared_without_reading(complete_stages: dict[str, Located], tmp_path: Path) -> None:
    folder = complete_stages["prune"].folder
    path = folder / "nemo/weights/__0_0.distcp"
    with corruption.damage_file(path, corruption.flip, tmp_path / "aside"):
        assert find_damage(folder, contents=False) is None
    with corruption.damage_file(path, corruption.truncate, tmp_path / "aside"):
        assert "__0_0.distcp has 4,500 bytes instead of 9,000" in str(find_damage(folder, contents=False))
    path.unlink()
    path.mkdir()
    assert "__0_0.distcp is not a file" in str(find_damage(folder, contents=False))


def test_ranks_share_the_reading_and_find_all_damage(complete_stages: dict[str, Located]) -> None:
    folder = complete_stages["prune"].folder
    for name in ("nemo/weights/__0_0.distcp", "nemo/weights/__0_1.distcp"):
        corruption.flip(folder / name)
    shares = [find_damage(folder, share=(rank, 2)) for rank in range(2)]
    assert [len(share.files) for share in shares if share] == [1, 1]
    entries = {str(size): {"size": size, "crc32": ""} for size in (1, 2, 3, 4, 5)}
    assert [sorted(select_share(entries, rank, 2)) for rank in range(2)] == [["1", "3", "5"], ["2", "4"]]


def test_only_damaged_inputs_stop_a_stage(complete_stages: dict[str, Located]) -> None:
    stages, folder = complete_stages, complete_stages["prune"].folder
    corruption.flip(folder / "blocks.json")
    assert damaged_inputs(stages["distill"], stages, contents=True) == []  # it reads nemo/ and the data
    corruption.flip(folder / "nemo/context/model.yaml")
    (found,) = damaged_inputs(stages["distill"], stages, contents=True)
    assert list(found.files) == ["nemo/context/model.yaml"]
    assert damaged_inputs(stages["distill"], stages, contents=False) == []
    assert [damage.folder for damage in damaged_inputs(stages["report"], stages, contents=True)] == [folder]


def test_unrecorded_files_are_not_inputs(complete_stages: dict[str, Located]) -> None:
    folder = complete_stages["prune"].folder
    assert "hf is not among what was written" in str(find_damage(folder, "hf"))
    assert select({"nemo2/a": {}, "nemo/b": {}, "nemo": {}}, "nemo") == {"nemo/b": {}, "nemo": {}}
    assert select({"a/b.json": {}, "a/c.bin": {}}, "a", ("*.json",)) == {"a/b.json": {}}


def test_the_message_names_the_folder_and_the_command(complete_stages: dict[str, Located], tmp_path: Path) -> None:
    folder = complete_stages["prune"].folder
    for name in RESULTS:
        (folder / name).unlink()
    damages = [find_damage(folder, part) for part in ("nemo", "winner", ".")]
    with pytest.raises(InputError) as caught:
        raise_if_damaged(filter(None, damages), tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{folder} is damaged: ")
    assert "and 3 more files" in message
    assert message.endswith(f"rm -r {folder} && the command that started the run")
    (tmp_path / "launches.jsonl").write_text('{"command": "first"}\n{"command": "python -m launch.run a=1"}\n')
    with pytest.raises(InputError, match=f"rm -r '/a b' {folder} && python -m launch.run a=1"):
        raise_if_damaged([Damage(Path("/a b"), {"x": "is missing"}), *filter(None, damages)], tmp_path)
    raise_if_damaged([], tmp_path)


def test_folders_made_before_outputs_were_recorded_are_used_and_named(complete_stages: dict[str, Located]) -> None:
    folder = complete_stages["prune"].folder
    manifest = read_manifest(folder) or {}
    write_json(folder / "manifest.json", {key: manifest[key] for key in manifest if key not in ("outputs", "crc32")})
    (folder / OUTPUTS).unlink()
    corruption.flip(folder / "nemo/context/model.yaml")
    assert complete_stages["prune"].complete
    assert find_damage(folder) is None
    message = describe_unrecorded(complete_stages.values())
    assert message is not None
    assert message.startswith("prune: not checked, because made before outputs were recorded")
    assert describe_unrecorded([complete_stages["prepare_data"], complete_stages["distill"]]) is None


def test_updating_the_record_of_a_file(complete_stages: dict[str, Located]) -> None:
    folder = complete_stages["prune"].folder
    (folder / "blocks.json").write_text("[]")
    corruption.flip(folder / "nemo/context/model.yaml")
    update_record(folder, ("blocks.json",))
    found = find_damage(folder)
    assert found is not None
    assert list(found.files) == ["nemo/context/model.yaml"]
    update_record(complete_stages["distill"].folder, ("blocks.json",))  # not complete
    assert not complete_stages["distill"].folder.exists()


ODD_RECORDS = (
    *("", "[]", "null", '{"a": 1}', '{"a": {"size": "1", "crc32": "0"}}', '{"a": {"size": 1}}', "[" * 9999),
    *('{"../a": {"size": 1, "crc32": "0"}}', '{"/etc/passwd": {"size": 1, "crc32": "0"}}'),
)


@pytest.mark.parametrize("content", ODD_RECORDS)
def test_invalid_records(complete_stages: dict[str, Located], content: str) -> None:
    assert parse_record(content.encode()) is None
    folder = complete_stages["prune"].folder
    (folder / OUTPUTS).write_text(content)
    assert "outputs.json has other content" in str(find_damage(folder))


def test_large_and_empty_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_READ_BYTES", 1000)
    content = os.urandom(2500)
    fill(tmp_path, {"large": content, "empty": b"", "exact": content[:1000]})
    assert digests(tmp_path, ["large", "empty", "exact"]) == {
        "large": {"size": 2500, "crc32": f"{zlib.crc32(content):08x}"},
        "empty": {"size": 0, "crc32": "00000000"},
        "exact": {"size": 1000, "crc32": f"{zlib.crc32(content[:1000]):08x}"},
    }


def checkpoint(folder: Path, step: int) -> Path:
    """Write a checkpoint like `Checkpoints`."""
    path = folder / f"step={step}"
    fill(path, {"weights/.metadata": b"m", "weights/__0_0.distcp": bytes([step]) * 5000, "context/model.yaml": b"a"})
    write_json(path / OUTPUTS, digests(path, [*list_files(path)]))
    return path


def test_a_training_resumes_from_the_newest_undamaged_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert resume_point(tmp_path / "none") is None
    older, newer = checkpoint(tmp_path, 2), checkpoint(tmp_path, 10)
    assert resume_point(tmp_path) == newer
    assert caplog.text == ""
    corruption.hole(newer / "weights/__0_0.distcp")
    assert resume_point(tmp_path) == older
    assert "step=10 is damaged: weights/__0_0.distcp has other content" in caplog.text
    assert "resuming from step=2; the damaged checkpoint is kept as .damaged.step=10" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == [".damaged.step=10", "step=2"]
    # No intact one is left: a whole training is not discarded silently.
    corruption.delete(older / "context/model.yaml")
    with pytest.raises(InputError, match=rf"step=2 is damaged: context/model.yaml is missing.*rm -r {tmp_path}"):
        resume_point(tmp_path)
    assert older.exists()


@pytest.mark.parametrize("damage", corruption.DAMAGES)
@pytest.mark.parametrize("name", ["weights/.metadata", "weights/__0_0.distcp", "context/model.yaml"])
def test_damage_to_a_checkpoint_is_found(tmp_path: Path, name: str, damage: Any) -> None:
    path = checkpoint(tmp_path, 2)
    with corruption.damage_file(path / name, damage, tmp_path / "aside"):
        assert checkpoint_damage(path) is not None
    assert checkpoint_damage(path) is None
    with corruption.damage_file(path / OUTPUTS, corruption.truncate, tmp_path / "aside"):
        assert checkpoint_damage(path) is not None


def test_other_names_are_not_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = checkpoint(tmp_path, 4)
    for name in ("step=abc", "step=-1", "step=", "step=007", "step=4.5", "step=4-last", ".partial.step=9", "4"):
        (tmp_path / name).mkdir()
    (tmp_path / "step=5").touch()
    assert find_checkpoints(tmp_path) == {4: whole}
    assert select_superfluous(tmp_path, 1, {5: 0.1, 4: 0.2}) == []
    assert resume_point(tmp_path) == whole
    # A folder with the name of a checkpoint, but without its content.
    (tmp_path / "step=8" / "step=9").mkdir(parents=True)
    assert resume_point(tmp_path) == whole
    assert "step=8 is damaged: weights/ is missing" in caplog.text


def test_checkpoints_that_were_written_before_records_are_used(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 4)
    (path / OUTPUTS).unlink()
    assert resume_point(tmp_path) == path
    shutil.rmtree(path / "context")
    with pytest.raises(InputError, match="context/ is missing"):
        resume_point(tmp_path)
