"""The stage table: complete, ordered, and selected by configs."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.planning.automatic import compose
from prune_distill.config.composition import config_groups
from prune_distill.config.typed import schema_keys
from prune_distill.config.values import count_ranks
from prune_distill.model.student import student_shape
from prune_distill.pipeline.artifact import locate
from prune_distill.pipeline.stage import External, Output
from prune_distill.pipeline.stages import STAGES, find, select_stages
from prune_distill.schema import MOST_SOURCE_TEACHERS, Family, Loss, QuantFormat, RunConfig
from prune_distill.schema.fields import Identity, identity_of

DROP = "prune.drop_layers=[2]"
CONTROLS = "distill.controls=[ce,scratch]"
ROUNDS = ("prune.rounds=[{steps: 20, num_layers: 5}, {steps: 30, drop_layers: [2]}]", "prune.num_layers=3")
FORMATS = [quant_format.value for quant_format in QuantFormat]
QUANTIZED = ("cluster.gpu=h100_sxm", f"quantize.formats=[{','.join(FORMATS)}]")
ON_POLICY = ("distill.on_policy={rounds: 2, steps: 30, lr: 1e-5, prompts_per_round: 8, engine: transformers}",)
CORRECTED = ("distill.teacher_correction={max_steps: 9, seq_length: 64, global_batch_size: 4, lr: 1e-4, min_lr: 1e-5}",)


def test_names_are_unique_and_modules_exist() -> None:
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    for stage in STAGES:
        assert importlib.util.find_spec(stage.module) is not None, stage.module


def test_sections_and_settings_are_keys_of_the_schema() -> None:
    known = set(schema_keys(RunConfig))
    cfg = compose(["experiment=demo", *ROUNDS])
    for stage in select_stages(cfg):
        assert {*stage.declared_keys(cfg), *stage.settings(cfg)} <= known, stage.name


def test_every_field_that_is_hashed_elsewhere_is_hashed_by_a_stage() -> None:
    hashed = {key for stage in STAGES for key in stage.sections}
    marked = set(_marked_keys(RunConfig(), Identity.hashed_elsewhere))
    assert marked == {
        *("distill.teacher_correction", "distill.on_policy"),
        *("evaluate.verify_tokens", "benchmark.cost_per_hour"),
    }
    assert marked <= hashed


def _marked_keys(group: Any, identity: Identity, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if identity_of(field, group) is identity:
            yield f"{prefix}{field.name}"
        elif dataclasses.is_dataclass(value):
            yield from _marked_keys(value, identity, f"{prefix}{field.name}.")


@pytest.mark.parametrize("name", [name for name in config_groups()["experiment"] if name != "own"])
def test_inputs_come_from_stages_that_ran_before(name: str) -> None:
    cfg = compose([f"experiment={name}"])
    done: list[str] = []
    for stage in select_stages(cfg):
        sources = stage.inputs(stage.configure(cfg)).values()
        assert {source.stage for source in sources if isinstance(source, Output)} <= set(done), stage.name
        done.append(stage.name)
    assert done[-1] == "report"


def is_round(name: str) -> bool:
    return ".round" in name or ".on_policy" in name


def test_selected_stages(demo: Callable[..., RunConfig]) -> None:
    every = [
        stage.name
        for stage in STAGES
        if stage.name not in ("search", "successive_halving")
        and not stage.name.endswith(".teacher")
        and ".source_teacher" not in stage.name
        and not is_round(stage.name)
    ]
    everything = demo(*CORRECTED, "distill.teacher_logits=cached", CONTROLS, *QUANTIZED)
    assert [stage.name for stage in select_stages(everything)] == every
    quantized = {f"{stage}.{name}" for stage in ("quantize", "evaluate") for name in FORMATS}
    plain = [name for name in every if name not in {"correct_teacher", "cache_logits", *quantized}]
    assert [stage.name for stage in select_stages(demo(CONTROLS))] == plain
    few = select_stages(demo("distill.controls=[]", "evaluate.verify_tokens=0"))
    controls = {f"{stage}.{name}" for stage in ("distill", "nemo_to_hf", "evaluate") for name in ("ce", "scratch")}
    left_out = {*controls, "verify_import", "verify"}
    assert [stage.name for stage in few] == [name for name in plain if name not in left_out]
    published = select_stages(compose(["experiment=qwen3_8b_to_6b_depth"]))
    assert published[0].name == "prepare_data"


def test_a_teacher_of_its_own_is_converted_verified_and_read_by_what_trains(demo: Callable[..., RunConfig]) -> None:
    teacher = (
        "teacher={hf_path: /models/teacher, family: llama, shape: {num_layers: 8, hidden_size: 320, "
        "ffn_hidden_size: 960, num_attention_heads: 5, num_query_groups: 5, kv_channels: 64, vocab_size: 1088, "
        "max_position_embeddings: 2048}}"
    )
    cfg, without = demo(teacher, *ROUNDS, "benchmark.enabled=true"), demo(*ROUNDS, "benchmark.enabled=true")
    names, plain = ([stage.name for stage in select_stages(config)] for config in (cfg, without))
    assert [name for name in names if name not in plain] == ["hf_to_nemo.teacher", "verify_import.teacher"]
    imported, original = Output("hf_to_nemo.teacher", "nemo"), Output("demo_model", "hf")
    for name in ("distill", "distill.round1"):
        assert find(name).inputs(cfg)["teacher"] == imported
    for name in ("importance", "prune"):
        assert find(name).inputs(demo(teacher))["teacher"] == Output("hf_to_nemo", "nemo")
    assert find("evaluate").inputs(cfg)["teacher"] == External(("/models/teacher",), hub=True)
    assert find("evaluate").inputs(cfg)["original"] == find("benchmark").inputs(cfg)["original"] == original
    assert "original" not in find("evaluate").inputs(without)
    assert find("benchmark").inputs(without)["teacher"] == original
    own = find("hf_to_nemo.teacher").configure(cfg)
    assert (own.model.hf_path, own.model.family) == ("/models/teacher", Family.llama)
    corrected = demo(teacher, *CORRECTED, "distill.teacher_logits=cached")
    assert find("correct_teacher").inputs(corrected)["teacher"] == imported
    assert find("cache_logits").inputs(corrected)["teacher"] == Output("correct_teacher", "nemo")
    assert "corrected_teacher" not in find("nemo_to_hf").inputs(corrected)
    assert find("evaluate").inputs(corrected)["corrected_teacher"] == Output("nemo_to_hf.teacher", "corrected_teacher")


SHAPE = (
    "{num_layers: 8, hidden_size: 320, ffn_hidden_size: 960, num_attention_heads: 5, num_query_groups: 5,"
    " kv_channels: 64, vocab_size: %d, max_position_embeddings: 2048}"
)


def by_source(*named: tuple[str, str, int]) -> str:
    """The sources of the data: name, folder of the teacher (empty: none), and entries of its vocabulary."""
    taught = {
        name: f", teacher: {{hf_path: {path}, family: llama, shape: {SHAPE % size}}}" if path else ""
        for name, path, size in named
    }
    return f"data.sources={{{', '.join(f'{name}: {{files: [{name}.jsonl]{own}}}' for name, own in taught.items())}}}"


CACHED = "distill.teacher_logits=cached"


def test_teachers_of_sources_have_stages_of_their_own(demo: Callable[..., RunConfig]) -> None:
    """Equal teachers are one. The teacher of the run caches the sequences of the sources without another one."""
    mixed = demo(
        CACHED, by_source(("web", "", 0), ("code", "/m/a", 1088), ("math", "/m/b", 1030), ("go", "/m/a", 1088))
    )
    plain = demo(CACHED)
    names = [stage.name for stage in select_stages(mixed)]
    stages = ("hf_to_nemo", "verify_import", "cache_logits")
    assert [name for name in names if name not in {stage.name for stage in select_stages(plain)}] == [
        *(f"{stage}.source_teacher{number}" for number in (1, 2) for stage in stages[:2]),
        *(f"cache_logits.source_teacher{number}" for number in (1, 2)),
    ]
    assert mixed.teacher_numbers == {"web": 0, "code": 1, "math": 2, "go": 1}
    owns = [find(name).configure(mixed) for name in names if name.startswith("cache_logits")]
    assert [own.cached_sources for own in owns] == [["web"], ["code", "go"], ["math"]]
    assert {own.shared_vocabulary for own in owns} == {mixed.shared_vocabulary} == {1024}
    assert [own.teacher.hf_path for own in owns] == [None, "/m/a", "/m/b"]
    inputs = find("distill").inputs(mixed)
    assert {name: source for name, source in inputs.items() if name not in ("student", "data")} == {
        "cached_logits": Output("cache_logits"),
        **{f"source_teacher{number}": Output(f"cache_logits.source_teacher{number}") for number in (1, 2)},
    }
    assert find("cache_logits.source_teacher2").inputs(mixed)["teacher"] == Output("hf_to_nemo.source_teacher2", "nemo")
    assert find("hf_to_nemo.source_teacher2").inputs(mixed)["hf_model"] == External(("/m/b",), hub=True)
    assert find("hf_to_nemo.source_teacher2").configure(mixed).model.hf_path == "/m/b"
    for_all = demo(CACHED, by_source(("code", "/m/a", 1088)))
    assert "cache_logits" not in [stage.name for stage in select_stages(for_all)]
    assert set(find("distill").inputs(for_all)) == {"student", "data", "source_teacher1"}
    assert plain.cached_sources is None
    assert find("cache_logits").configure(plain) == plain


def test_a_teacher_of_a_source_is_in_the_hashes_of_what_reads_it(
    demo: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")

    def hashes(*more: str) -> dict[str, str]:
        return {name: one.config_hash for name, one in locate(demo(CACHED, *more)).items()}

    def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
        return {name for name in before if name in after and before[name] != after[name]} & {
            *("prepare_data", "hf_to_nemo", "prune", "distill", "cache_logits"),
            *(f"cache_logits.source_teacher{number}" for number in (1, 2)),
        }

    none = hashes(by_source(("a", "", 0), ("b", "", 0), ("c", "", 0)))
    one = hashes(by_source(("a", "", 0), ("b", "m/b", 1088), ("c", "", 0)))
    assert changed(none, one) == {"distill", "cache_logits"}  # the latter has fewer sequences
    two = hashes(by_source(("a", "", 0), ("b", "m/b", 1088), ("c", "m/c", 1088)))
    assert changed(one, two) == {"distill", "cache_logits"}
    other = hashes(by_source(("a", "", 0), ("b", "m/b", 1088), ("c", "m/a", 1088)))
    assert changed(two, other) == {"distill", "cache_logits.source_teacher2"}
    smaller = hashes(by_source(("a", "", 0), ("b", "m/b", 1088), ("c", "m/c", 1000)))
    caches = {"cache_logits", "cache_logits.source_teacher1", "cache_logits.source_teacher2"}
    assert changed(two, smaller) == {"distill", *caches}


def test_the_teacher_and_the_documents_are_the_demos_or_the_users(demo: Callable[..., RunConfig]) -> None:
    assert find("hf_to_nemo").inputs(demo()) == {"hf_model": Output("demo_model", "hf")}
    assert find("prepare_data").inputs(demo())["train"] == Output("demo_model", "corpus/train.jsonl")
    own = compose(["experiment=qwen3_8b_to_6b_width", "data.train=[a.jsonl]", "data.validation=[v.jsonl]"])
    assert find("prepare_data").inputs(own) == {
        "tokenizer": External(("Qwen/Qwen3-8B",), hub=True),
        "train": External(("a.jsonl",), documents=True),
        "validation": External(("v.jsonl",), documents=True),
    }


def test_the_source_of_the_students_shape(demo: Callable[..., RunConfig]) -> None:
    named = [stage.name for stage in select_stages(demo("prune.num_layers=null", "prune.ffn_hidden_size=null", DROP))]
    assert "importance" not in named
    budget = ("prune.num_layers=null", "prune.ffn_hidden_size=null", "prune.budget.params_fraction=0.667")
    searched = demo(*budget)
    assert [stage.name for stage in select_stages(searched)][4:7] == ["importance", "search", "prune"]
    assert find("prune").inputs(searched)["choice"] == Output("search")
    fought = demo(*budget, "prune.successive_halving.round_tokens=10000")
    assert [stage.name for stage in select_stages(fought)][4:8] == [
        "importance",
        "search",
        "successive_halving",
        "prune",
    ]
    assert find("prune").inputs(fought)["choice"] == Output("successive_halving")
    assert find("distill").inputs(fought)["winner"] == Output("successive_halving", "winner")
    assert set(find("successive_halving").inputs(fought)) == {"teacher", "data", "search"}
    assert find("successive_halving").more_sections(fought) == ()
    task = ("prune.successive_halving.score.task=mmlu", "evaluate.tasks=[mmlu]", "evaluate.task_folder=tasks")
    scored = demo(*budget, "prune.successive_halving.round_tokens=10000", *task)
    assert set(find("successive_halving").inputs(scored)) == {"teacher", "data", "search", "teacher_hf", "task_folder"}
    decided_by = {"evaluate.continuations", "evaluate.num_fewshot", "evaluate.task_limit", "convert.export_dtype"}
    assert set(find("successive_halving").more_sections(scored)) == decided_by
    for name in ("distill.ce", "distill.scratch"):
        control = find(name)
        assert "winner" not in control.inputs(control.configure(fought))


def test_a_control_is_distillation_without_a_teacher(demo: Callable[..., RunConfig]) -> None:
    cfg = demo()
    control = find("distill.ce")
    variant = control.configure(cfg)
    assert variant.distill.loss is Loss.ce
    assert cfg.distill.loss is Loss.kd
    assert "teacher" not in control.inputs(variant)
    assert "teacher" in find("distill").inputs(cfg)


def test_cached_logits_replace_the_teacher(demo: Callable[..., RunConfig]) -> None:
    cfg = demo("distill.teacher_logits=cached")
    inputs = find("distill").inputs(cfg)
    assert inputs["cached_logits"] == Output("cache_logits")
    assert "teacher" not in inputs
    assert find("cache_logits").inputs(cfg)["teacher"] == Output("hf_to_nemo", "nemo")


def test_the_corrected_teacher_is_not_pruned(demo: Callable[..., RunConfig]) -> None:
    corrected = Output("correct_teacher", "nemo")
    cfg = demo(*CORRECTED)
    assert find("distill").inputs(cfg)["teacher"] == corrected
    assert find("prune").inputs(cfg)["teacher"] == Output("hf_to_nemo", "nemo")
    assert find("nemo_to_hf").inputs(cfg)["corrected_teacher"] == corrected
    assert find("cache_logits").inputs(demo(*CORRECTED, "distill.teacher_logits=cached"))["teacher"] == corrected
    swapped = find("distill").inputs(demo(*CORRECTED, "distill.swap_teacher_at_step=20"))
    assert (swapped["teacher"], swapped["corrected_teacher"]) == (Output("hf_to_nemo", "nemo"), corrected)


@pytest.mark.parametrize("change", ["distill.lr=3e-4", "distill.kd.temperature=2", "distill.warmup_steps=3"])
def test_a_sweep_of_the_student_does_not_cache_logits_again(demo: Callable[..., RunConfig], change: str) -> None:
    made, changed = (_folders(demo("distill.teacher_logits=cached", *more)) for more in ([], [change]))
    assert made["distill"] != changed["distill"]
    assert (made["distill.ce"] == changed["distill.ce"]) == (".kd." in change)
    assert (made["cache_logits"] == changed["cache_logits"]) == ("temperature" not in change)


@pytest.mark.parametrize(
    "change",
    [
        "distill.teacher_logits=cached",
        "distill.cached_logits_top_k=8",
        CORRECTED[0],
        "distill.cached_logits_shard_sequences=1",
    ],
)
def test_controls_do_not_depend_on_teacher_settings(demo: Callable[..., RunConfig], change: str) -> None:
    assert _folders(demo())["distill.ce"] == _folders(demo(change))["distill.ce"]


def test_fp8_is_part_of_what_it_changes(demo: Callable[..., RunConfig]) -> None:
    def changed(*changes: str) -> set[str]:
        """The stages of the distillation that other settings of FP8 change."""
        base = ("distill.precision=bf16", "distill.teacher_logits=cached")
        before, after = _folders(demo(*base)), _folders(demo(*base, *changes))
        return {name for name in ("cache_logits", "distill", "distill.ce", "prune") if before[name] != after[name]}

    assert changed("distill.fp8=hybrid") == {"distill", "distill.ce"}
    assert changed("distill.teacher_fp8=true") == {"cache_logits", "distill"}
    assert changed("distill.teacher_fp8=true", "distill.fp8=blockwise") == {"cache_logits", "distill", "distill.ce"}
    # The scales of the teacher are those of the student.
    one, other = (
        _folders(
            demo(
                "distill.precision=bf16",
                "distill.teacher_logits=cached",
                "distill.teacher_fp8=true",
                f"distill.fp8={fp8}",
            )
        )["cache_logits"]
        for fp8 in ("hybrid", "blockwise")
    )
    assert one != other


def _folders(cfg: RunConfig) -> dict[str, str]:
    return {name: stage.config_hash for name, stage in locate(cfg).items()}


def test_ranks(demo: Callable[..., RunConfig]) -> None:
    batches = ("distill.global_batch_size=8", "model.demo.training.global_batch_size=8")
    cfg = demo("cluster.devices_per_node=2", "prune.pipeline_model_parallel_size=2", *batches)
    named = [
        stage for stage in STAGES if stage.name not in ("search", "successive_halving") and not is_round(stage.name)
    ]
    ranks = {stage.name: stage.ranks(cfg) for stage in named}
    of_all_ranks = {"correct_teacher", "cache_logits", "distill", "distill.ce", "distill.scratch"}
    of_all_ranks |= {f"cache_logits.source_teacher{number}" for number in range(1, MOST_SOURCE_TEACHERS + 1)}
    of_all_ranks |= {"evaluate", *(f"evaluate.{name}" for name in ("ce", "scratch", *FORMATS))}
    assert {name for name, count in ranks.items() if count == 2} == {"importance", "prune", *of_all_ranks}


def test_the_import_is_verified_before_it_is_used(demo: Callable[..., RunConfig]) -> None:
    names = [stage.name for stage in select_stages(demo(*CORRECTED, CONTROLS))]
    assert names[names.index("hf_to_nemo") + 1] == "verify_import"
    gates = [stage for stage in STAGES if stage.gate]
    own = [f"verify_import.source_teacher{number}" for number in range(1, MOST_SOURCE_TEACHERS + 1)]
    assert [stage.name for stage in gates] == ["verify_import", "verify_import.teacher", *own]
    assert set(gates[0].inputs(demo())) == {"teacher_hf", "teacher_nemo", "data"}
    assert set(find("verify").inputs(demo())) == {"student_hf", "student_nemo", "data"}


def test_an_unknown_stage_is_reported_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match="no stage 'destil'; use one of demo_model, prepare_data"):
        find("destil")


def test_ranks_are_counted_over_all_nodes() -> None:
    assert count_ranks(compose(["experiment=qwen3_8b_to_6b_depth"])) == 8


def test_rounds_prune_the_previous_student_and_keep_the_teacher(
    demo: Callable[..., RunConfig],
) -> None:
    cfg = demo(*ROUNDS)
    rows = {stage.name: stage for stage in select_stages(cfg)}
    # Named layers need no importance scores.
    in_rounds = ("importance.round1", "prune.round1", "distill.round1", "prune.round2", "distill.round2", "importance")
    assert [name for name in rows if ".round" in name or name == "importance"] == [*in_rounds]
    inputs = {name: stage.inputs(stage.configure(cfg)) for name, stage in rows.items()}
    teacher = Output("hf_to_nemo", "nemo")
    of_round = {"prune.round1": teacher, "prune.round2": Output("distill.round1", "nemo")}
    for name, pruned in {**of_round, "prune": Output("distill.round2", "nemo")}.items():
        assert inputs[name]["teacher"] == pruned
    for name in ("distill.round1", "distill.round2", "distill"):
        assert inputs[name]["teacher"] == teacher
        assert inputs[name]["student"] == Output(name.replace("distill", "prune"), "nemo")
    assert inputs["prune"]["before"] == Output("prune.round2")
    of_second = rows["distill.round2"].configure(cfg)
    assert (of_second.distill.max_steps, of_second.prune.drop_layers, of_second.prune.num_layers) == (30, [2], None)
    assert student_shape(of_second).num_layers == 4
    assert student_shape(cfg).num_layers == 3


def test_on_policy_rounds_follow_the_distillation(demo: Callable[..., RunConfig]) -> None:
    cfg = demo(*ON_POLICY, *CORRECTED, "distill.swap_teacher_at_step=20", "distill.phases=[{max_steps: 160}]")
    rows = {stage.name: stage for stage in select_stages(cfg)}
    names = [name for name in rows if is_round(name)]
    assert names == [f"{kind}.on_policy{n}" for n in (1, 2) for kind in ("nemo_to_hf", "generate", "distill")]
    inputs = {name: stage.inputs(stage.configure(cfg)) for name, stage in rows.items()}
    data = Output("prepare_data")
    for name, before in {"on_policy1": "distill", "on_policy2": "distill.on_policy1"}.items():
        student = Output(before, "nemo")
        assert inputs[f"nemo_to_hf.{name}"]["student"] == student
        assert inputs[f"generate.{name}"] == {"student": Output(f"nemo_to_hf.{name}", "student"), "data": data}
        teacher, completions = Output("correct_teacher", "nemo"), Output(f"generate.{name}")
        trained = {"student": student, "completions": completions, "data": data, "teacher": teacher}
        assert inputs[f"distill.{name}"] == trained
    last = Output("distill.on_policy2", "nemo")
    assert inputs["evaluate"]["distilled"] == Output("nemo_to_hf.on_policy1", "student")
    assert inputs["nemo_to_hf"]["student"] == inputs["verify"]["student_nemo"] == last
    first, second = (rows[f"distill.on_policy{number}"].configure(cfg) for number in (1, 2))
    assert (first.distill.max_steps, first.distill.lr) == (30, 1e-5)
    assert [(phase.max_steps, phase.weights) for phase in first.distill.phases or ()] == [
        (30, {"off-policy": 0.5, "on-policy": 0.5})
    ]
    assert len({cfg.seed, first.seed, second.seed}) == 3


def test_on_policy_rounds_score_completions_as_the_distillation_does(demo: Callable[..., RunConfig]) -> None:
    cfg = demo(*ON_POLICY, "distill.teacher_logits=cached")
    rows = {stage.name: stage for stage in select_stages(cfg)}
    inputs = {name: stage.inputs(stage.configure(cfg)) for name, stage in rows.items()}
    assert inputs["cache_logits.on_policy2"]["completions"] == Output("generate.on_policy2")
    assert inputs["distill.on_policy2"]["cached_logits"] == Output("cache_logits.on_policy2")
    assert "teacher" not in inputs["distill.on_policy2"]


def test_generation_takes_a_node_for_each_task() -> None:
    words = ("experiment=qwen3_8b_to_6b_depth", "cluster=one_node", *ON_POLICY)
    cfg = compose([*words, "cluster.nodes=2", "cluster.rdzv_endpoint=a:1", "distill.on_policy.array_tasks=3"])
    generate = find("generate.on_policy1")
    assert (generate.ranks(cfg), generate.tasks(cfg), generate.shares_work) == (8, 3, True)


def test_prompts_of_files_are_an_input(demo: Callable[..., RunConfig]) -> None:
    cfg = demo(*ON_POLICY, "distill.on_policy.prompts=[a.jsonl]")
    generate = find("generate.on_policy1")
    assert generate.inputs(generate.configure(cfg))["prompts"] == External(("a.jsonl",), documents=True)


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        *((change, set()) for change in ("rounds=3", "batch_size=3", "array_tasks=2")),
        *((change, {"distill"}) for change in ("lr=2e-5", "min_lr=1e-6", "warmup_steps=3")),
        *((change, {"cache_logits", "distill"}) for change in ("mix=0.7", "steps=40")),
        *(
            (change, {"generate", "cache_logits", "distill"})
            for change in (
                *("temperature=0.5", "top_p=0.5", "prompts_per_round=9", "prompt_tokens=9", "max_new_tokens=9"),
                *("samples_per_prompt=2", "shard_prompts=2", "engine=vllm"),
            )
        ),
    ],
)
def test_what_a_setting_of_the_rounds_does_again(demo: Callable[..., RunConfig], change: str, redone: set[str]) -> None:
    base = (*ON_POLICY, "distill.teacher_logits=cached")
    before, after = _folders(demo(*base)), _folders(demo(*base, f"distill.on_policy.{change}"))
    changed = {name for name in before if before[name] != after[name]}
    assert {name.partition(".")[0] for name in changed if name.endswith(".on_policy1")} == redone
    # Neither the distillation before nor its export.
    assert not changed & {"distill", "cache_logits", "nemo_to_hf.on_policy1"}
