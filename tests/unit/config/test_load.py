"""Compose, write and read a run's config."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from launch.jobs import make_paths_absolute
from launch.planning.automatic import compose
from launch.planning.plan import make_plan
from prune_distill.config.composition import CONFIG_DIR, config_groups, sweep
from prune_distill.config.input_files import input_files
from prune_distill.config.load import load_resolved, save_resolved
from prune_distill.config.typed import plain, schema_keys
from prune_distill.errors import ConfigError
from prune_distill.model.student import student_shape
from prune_distill.pipeline.artifact import write_json
from prune_distill.schema import DataSource, Family, Gpu, Loss, NumaBinding, Precision, Recompute, RunConfig, Shape
from prune_distill.schema.phases import training_phases

# Experiments that need no input of the user.
EXPERIMENTS = [name for name in config_groups()["experiment"] if name != "own"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_valid_and_round_trips(tmp_path: Path, name: str) -> None:
    cfg = compose([f"experiment={name}"])
    assert cfg.name == name
    assert cfg.run_dir == f"runs/{name}"
    assert cfg.model.shape is not None
    path = tmp_path / "resolved.yaml"
    save_resolved(cfg, path)
    assert load_resolved(path) == cfg
    assert [entry.name for entry in tmp_path.iterdir()] == ["resolved.yaml"]


def test_documented_experiments_exist() -> None:
    promised = {"demo", "qwen3_8b_to_6b_depth", "qwen3_8b_to_6b_width", "llama3_1_8b_to_4b_depth"}
    more = {"llama3_1_8b_to_4b_width", "qwen3_0_6b_one_gpu", "qwen3_8b_to_6b_reasoning"}
    assert promised | more <= set(EXPERIMENTS)


def test_the_published_reasoning_blend() -> None:
    cfg = compose(["experiment=qwen3_8b_to_6b_reasoning"])
    weights = {name: source.weight or 0 for name, source in (cfg.data.sources or {}).items()}
    assert (weights.pop("climbmix"), sum(weights.values())) == (30, 70)
    first, second = training_phases(cfg.distill)
    assert [first.seq_length, second.seq_length] == [8192, 32768]
    # 80 and 20 billion tokens, with as many a step; rounded to whole hundreds of steps.
    assert first.tokens_a_step == second.tokens_a_step
    assert first.steps * first.tokens_a_step == pytest.approx(80e9, rel=0.01)
    assert second.steps * second.tokens_a_step == pytest.approx(20e9, rel=0.01)
    assert cfg.distill.parallel.context_parallel_size == 2
    blend = compose(["experiment=qwen3_8b_to_6b_reasoning", "data=nemotron"]).data.sources or {}
    assert sum(source.weight or 0 for source in blend.values()) == 100


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("qwen3_8b_to_6b_depth", 90e9),
        ("qwen3_8b_to_6b_width", 90e9),
        ("llama3_1_8b_to_4b_depth", 94e9),
        ("llama3_1_8b_to_4b_width", 94e9),
    ],
)
def test_published_token_budgets(name: str, tokens: float) -> None:
    run = compose([f"experiment={name}"]).distill
    # The published counts are rounded to the billion.
    assert run.max_steps * run.seq_length * run.global_batch_size == pytest.approx(tokens, abs=0.5e9)
    assert (run.lr, run.min_lr, run.loss) == (1e-4, 1e-5, Loss.kd)


GROUP_FILES = [(group, name) for group, names in config_groups().items() for name in names if group != "experiment"]


@pytest.mark.parametrize(("group", "name"), GROUP_FILES)
def test_files_of_groups_hold_known_keys_only(group: str, name: str) -> None:
    tree: Any = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / group / f"{name}.yaml"))
    tree.pop("defaults", None)
    # The sources of documents have names of their own.
    for source in (tree.pop("sources", None) or {}).values() if group == "data" else ():
        assert set(source) <= {field.name for field in dataclasses.fields(DataSource)}
    # A layout concerns several groups.
    assert set(_keys(tree, "" if group == "layout" else f"{group}.")) <= set(schema_keys(RunConfig))


@pytest.mark.parametrize("file", sorted((CONFIG_DIR / "cluster" / "gpu").glob("*.yaml")), ids=lambda file: file.stem)
def test_files_of_gpus_state_what_a_plan_needs(file: Path) -> None:
    tree: Any = OmegaConf.to_container(OmegaConf.load(file))
    assert set(tree) == {field.name for field in dataclasses.fields(Gpu)} - {"mfu", "cost_per_hour"}
    assert all(tree[name] for name in ("name", "memory_gib", "bf16_tflops", "memory_gbs", "link_gbs"))
    # Each figure has its source beside it.
    assert all("#" in line for line in file.read_text().splitlines()[2:])


def _keys(tree: Any, prefix: str) -> Iterator[str]:
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


@pytest.mark.parametrize("name", config_groups()["cluster"])
def test_clusters(name: str) -> None:
    overrides = [f"cluster={name}", "distill.global_batch_size=32", "model.demo.training.global_batch_size=32"]
    if name == "slurm":
        overrides += [f"cluster.slurm.{key}=null" for key in ("partition", "account", "container_image")]
    assert compose(["experiment=demo", *overrides]).cluster.name == name


def test_values_are_typed() -> None:
    cfg = compose(["experiment=demo", "distill.lr=1", "distill.recompute=full", "model.revision=1234", "seed=7"])
    assert isinstance(cfg, RunConfig)
    assert isinstance(cfg.model.shape, Shape)
    assert type(cfg.distill.lr) is float
    assert cfg.distill.recompute is Recompute.full
    assert cfg.distill.precision is Precision.fp32
    assert cfg.model.family is Family.qwen3
    assert cfg.model.revision == "1234"
    assert cfg.seed == 7
    for key in schema_keys(RunConfig):
        value: Any = cfg
        for part in key.split("."):
            value = getattr(value, part)
            if value is None:
                break
        assert value != "???", key


def test_an_experiment_may_be_added_with_a_plus_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert compose(["+experiment=demo"]) == compose(["experiment=demo"])
    assert list(tmp_path.iterdir()) == []


def test_the_environment_sets_the_path_of_climbmix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIMBMIX_DIR", "/data/mix")
    train = compose(["experiment=qwen3_8b_to_6b_depth"]).data.train
    assert train is not None
    assert (train[0], len(train)) == ("/data/mix/part_0.jsonl", 25)


def test_a_model_without_an_experiment(hf_folder: Callable[..., Path]) -> None:
    cfg = compose(_own_model(hf_folder()))
    assert cfg.model.shape == Shape(4, 128, 256, 4, 2, 64, 512, 1024, True)


def _own_model(folder: Path | str, *more: str) -> list[str]:
    sizes = ["prune.num_layers=2", "prune.calibration_seq_length=512", "evaluate.seq_length=512"]
    training = ["distill.seq_length=512", "distill.parallel.tensor_model_parallel_size=1"]
    return ["model=local", "name=mine", f"model.hf_path={folder}", "data.train=[docs.jsonl]", *sizes, *training, *more]


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        # Missing values are the defaults of transformers for this family; null is derived from other sizes.
        ({"head_dim": None}, "kv_channels", 128),
        ({"tie_word_embeddings": None}, "tie_word_embeddings", False),
        # transformers 4.56 renamed one, transformers 5 moved the other; neither affects the shape.
        ({"dtype": None, "torch_dtype": "bfloat16"}, "hidden_size", 128),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, "hidden_size", 128),
    ],
)
def test_spellings_of_config_json(
    hf_folder: Callable[..., Path], changes: dict[str, Any], field: str, value: object
) -> None:
    assert getattr(compose(_own_model(hf_folder(**changes))).model.shape, field) == value


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_size": None}, ["config.json: hidden_size: missing", "fetch the file again"]),
        ({"attention_bias": True}, ["config.json: attention_bias=true: "]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ['rope_scaling.rope_type="yarn"']),
        ({"model_type": "gemma2"}, ['model_type="gemma2": ', "qwen3, qwen2, llama"]),
        ({"num_hidden_layers": 1}, ["prune.num_layers=2: larger than the teacher's 1"]),
        ({"max_position_embeddings": 256}, ["prune.calibration_seq_length=512: longer"]),
    ],
)
def test_faults_of_a_config_json(hf_folder: Callable[..., Path], changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(_own_model(hf_folder(**changes)))
    for part in parts:
        assert part in str(caught.value.faults[0])


def test_a_folder_without_config_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: does not exist; set model\.hf_path"):
        compose(_own_model(tmp_path))


def test_a_shape_that_contradicts_config_json_is_named_field_by_field(hf_folder: Callable[..., Path]) -> None:
    whole = dataclasses.asdict(Shape(4, 128, 256, 4, 2, 64, 512, 1024, True))
    shape = {key: value for key, value in whole.items() if value is not None} | {"hidden_size": 64, "vocab_size": 500}
    with pytest.raises(ConfigError) as caught:
        compose(_own_model(hf_folder(), *(f"model.shape.{key}={value}" for key, value in shape.items())))
    first, second = map(str, caught.value.faults)
    assert "model.shape.hidden_size=64: " in first
    assert "has hidden_size=128; set model.shape.hidden_size=128, or model.shape=null" in first
    assert "model.shape.vocab_size=500" in second


def test_a_hub_id_is_read_from_the_local_cache(
    hf_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    cache = tmp_path / "cache"
    snapshot = cache / "models--owner--name" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    os.rename(hf_folder(), snapshot)
    (cache / "models--owner--name" / "refs").mkdir()
    (cache / "models--owner--name" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert compose(_own_model("owner/name")).model.shape == Shape(4, 128, 256, 4, 2, 64, 512, 1024, True)
    with pytest.raises(ConfigError, match="not in the local Hub cache"):
        compose(_own_model("owner/name", "model.revision=v2"))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("name: x\nbogus: 1\n", "bogus: not a known key"),
        ("- 1\n", "not keys and values"),
        ("a: [", "not readable"),
        ("a: 1\na: 2\n", "not readable"),
        ("\xff\xfe", "start launch.run again"),
    ],
)
def test_faults_of_a_resolved_file(tmp_path: Path, content: str, part: str) -> None:
    path = tmp_path / "resolved.yaml"
    path.write_bytes(content.encode("latin1"))
    with pytest.raises(ConfigError) as caught:
        load_resolved(path)
    assert part in str(caught.value)


def test_a_missing_resolved_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_resolved(tmp_path / "resolved.yaml")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "resolved.yaml"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", _full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_resolved(compose(["experiment=demo"]), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def _full_disk(handle: int) -> None:
    raise OSError("No space left on device")


def test_strings_that_look_like_other_types_round_trip(tmp_path: Path) -> None:
    cfg = compose(["experiment=demo"])
    cfg.data.text_key, cfg.model.revision = "1e5", "0123"
    save_resolved(cfg, tmp_path / "r.yaml")
    assert load_resolved(tmp_path / "r.yaml") == cfg


def test_plain_values_are_member_names() -> None:
    assert plain(compose(["experiment=demo"]))["distill"]["loss"] == "kd"


def test_sweeps() -> None:
    assert sweep(["experiment=demo", "distill.lr=1e-3,1e-4", "seed=range(1,3)"]) == [
        ["experiment=demo", "++distill.lr=0.001", "++seed=1"],
        ["experiment=demo", "++distill.lr=0.001", "++seed=2"],
        ["experiment=demo", "++distill.lr=0.0001", "++seed=1"],
        ["experiment=demo", "++distill.lr=0.0001", "++seed=2"],
    ]
    with pytest.raises(ConfigError, match="does not support sweep type"):
        sweep(["experiment=demo", "distill.lr=interval(0,1)"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["distill.kd.lm_weight=0"], "KL divergence from the teacher"),
        ([], "0.5 x KL divergence from the teacher + 0.5 x cross-entropy on the data"),
        (["distill.loss=ce", "distill.controls=[]"], "cross-entropy on the data"),
        (
            [
                *("distill.kd.divergence=jensen_shannon", "distill.kd.lm_weight=0"),
                "distill.kd.intermediate_pairs=[{student:2,teacher:3}]",
            ],
            "0.5 x Jensen-Shannon divergence from the teacher + 1 x distance of layer pairs",
        ),
    ],
)
def test_the_description_of_the_loss(overrides: list[str], words: str) -> None:
    assert compose(["experiment=demo", *overrides]).distill.loss_in_words == words


def test_a_user_config_folder(tmp_path: Path) -> None:
    site = tmp_path / "it's my site"
    (site / "cluster").mkdir(parents=True)
    (site / "experiment").mkdir()
    (site / "notes").mkdir()
    (site / "notes" / "x.yaml").write_text("")
    (site / "cluster" / "my_site.yaml").write_text("defaults:\n  - one_node\nname: my_site\ndevices_per_node: 1\n")
    (site / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - demo\n  - override /cluster: my_site\nname: mine\n"
    )
    cfg = compose(["experiment=mine"], config_dir=site)
    assert (cfg.name, cfg.cluster.name, cfg.cluster.numa_binding, cfg.prune.num_layers) == (
        *("mine", "my_site", NumaBinding.node, 4),
    )
    assert sweep(["experiment=mine", "seed=1,2"], site) == [["experiment=mine", f"++seed={seed}"] for seed in (1, 2)]
    groups = config_groups(site)
    assert {"my_site", "local"} <= set(groups["cluster"])
    assert "notes" not in groups
    save_resolved(cfg, tmp_path / "r.yaml")
    assert load_resolved(tmp_path / "r.yaml") == cfg
    with pytest.raises(ConfigError, match="cluster=my_sit: does not exist \\(did you mean my_site"):
        compose(["experiment=demo", "cluster=my_sit"], config_dir=site)


def test_faults_of_a_user_config_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: not a folder"):
        compose(["experiment=demo"], config_dir=tmp_path / "nowhere")
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "slurm.yaml").write_text("name: slurm\n")
    with pytest.raises(ConfigError, match="cluster/slurm.yaml: has the name of one of the project's own files"):
        compose(["experiment=demo"], config_dir=tmp_path)


def test_the_second_link_of_a_chain_prunes_the_first_student_with_the_first_teacher() -> None:
    experiment = "experiment=qwen3_6b_to_4b_chained"
    with pytest.raises(ConfigError, match=r"model\.hf_path=runs/.*does not exist; set model\.hf_path"):
        compose([experiment], check_files=True)
    cfg = compose([experiment, "model.hf_path=/runs/first/nemo_to_hf-1a2b3c4d/student"])
    first = compose(["experiment=qwen3_8b_to_6b_depth"])
    assert cfg.model.shape == student_shape(first)
    assert (cfg.teacher.shape, cfg.teacher.hf_path) == (first.model.shape, first.model.hf_path)
    assert student_shape(cfg).num_layers == 16
    plan = make_plan(cfg)
    assert plan.original is not None
    assert (plan.original.parameters, plan.teacher.parameters) == (5_875_378_176, 8_190_735_360)
    assert plan.cut == 1 - 4_331_806_720 / 5_875_378_176
    assert {"hf_to_nemo.teacher", "verify_import.teacher"} <= {stage.stage for stage in plan.stages}


def test_the_teacher_of_a_source_is_read_from_its_folder(
    hf_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hf_folder(model_type="llama", hidden_size=192)
    monkeypatch.chdir(tmp_path)
    for name in ("web", "code"):
        (tmp_path / f"{name}.jsonl").write_text("")
    cfg = compose(
        [
            *("experiment=demo", "distill.teacher_logits=cached", "data.sources.web.files=[web.jsonl]"),
            *("data.sources.code.files=[code.jsonl]", "data.sources.code.teacher.hf_path=hf"),
        ]
    )
    (teacher,) = cfg.source_teachers
    assert teacher.shape is not None
    assert (teacher.family, teacher.shape.hidden_size) == (Family.llama, 192)
    assert dict(input_files(cfg))["data.sources.code.teacher.hf_path"] == str(folder)
    placed = make_paths_absolute(cfg)
    assert [one.hf_path for one in placed.source_teachers] == [str(folder)]
    save_resolved(placed, tmp_path / "r.yaml")
    assert load_resolved(tmp_path / "r.yaml") == placed


def test_the_own_experiment_needs_a_path_documents_and_a_size(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder(model_type="llama", max_position_embeddings=2048)
    own = ["experiment=own", f"model.hf_path={folder}", "data.train=[docs.jsonl]", "prune.num_layers=2"]
    cfg = compose(own)
    assert (cfg.model.family, cfg.distill.parallel.tensor_model_parallel_size) == (Family.llama, 1)
    # A single key sets all lengths.
    short = compose([*own, "distill.seq_length=64"])
    assert {short.prune.calibration_seq_length, short.distill.seq_length, short.evaluate.seq_length} == {64}
    with pytest.raises(ConfigError, match="model.family=qwen3: .* has model_type=llama; set model.family=llama"):
        compose([*own, "model.family=qwen3"])


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_resolved(compose(["experiment=demo"]), tmp_path / "r.yaml")
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("r.yaml", "a.json")] == [0o640, 0o640]
