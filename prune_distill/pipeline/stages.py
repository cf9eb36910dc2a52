"""The stage table: what a run consists of, and what each stage is given. No torch, no NeMo.

A stage is a module with `run(cfg, inputs, out) -> metrics`, which the runner imports and calls: `python -m recipes NAME
--config RUN_DIR/resolved.yaml`. Stages know each other only through this table: an input is a folder that another stage
completed, or something of the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prune_distill.config.data_files import sources
from prune_distill.config.values import count_ranks, replace_values
from prune_distill.model.student import MOST_ROUNDS, needs_importance, round_settings
from prune_distill.pipeline.names import CHECKPOINTS, HF, NEMO
from prune_distill.schema import DocumentFormat, Engine, Init, Loss, RunConfig, TeacherSignal


@dataclass(frozen=True)
class Output:
    """`path` inside the folder of the completed stage `stage`; `files`: patterns of what is read of it."""

    stage: str
    path: str = "."
    files: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class External:
    """Something of the user's: files or folders (globs allowed), or, where `hub`, a Hub id with its revision.

    Attributes:
        documents: whether of a folder only the files of documents are read.
    """

    paths: tuple[str, ...]
    revision: str | None = None
    hub: bool = False
    documents: bool = False


Source = Output | External

# What makes a process a rank of a job: torchrun sets these for its ranks
# (torch/distributed/elastic/agent/server/local_elastic_agent.py:413-430); Lightning reads NODE_RANK as well
# (lightning/fabric/plugins/environments/lightning.py). A shell may have them from another job.
TORCHRUN_ID = "TORCHELASTIC_RUN_ID"
RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *(TORCHRUN_ID, "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE"),
    "TORCHELASTIC_ERROR_FILE",
)


def _one(_: RunConfig) -> int:
    return 1


def _always(_: RunConfig) -> bool:
    return True


def _is_verified(cfg: RunConfig) -> bool:
    return cfg.evaluate.verify_tokens > 0


def _no_settings(_: RunConfig) -> dict[str, Any]:
    return {}


def _none(_: RunConfig) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        name: the stage's name, unique in the table; a variant of a stage is named `<stage>.<variant>`.
        module: the module that holds its `run`.
        sections: dotted config keys that decide the result, besides the inputs and `seed`.
        inputs: the stage's inputs by name, for a config.
        ranks: how many processes it wants; above 1, torchrun starts them.
        wanted: whether a config asks for the stage at all.
        settings: config values that make a variant of the stage, by dotted key, for a config.
        folder: the folder's name where it is fixed; otherwise `<name>-<hash8>`.
        trains: whether it trains, or works for as long, so that it can be asked to save and pause, and goes on from
            there.
        more_sections: of `sections`, for a config that makes the stage heed them.
        libraries: distributions whose versions decide the result, besides those that decide all stages'.
        shows: dotted keys whose values appear in what the stage writes, without deciding it.
        limits: dotted keys whose values a metric of the complete stage may not exceed, and that metric's name.
        tasks: how many processes may share its work, each started by itself (tasks of a Slurm job array).
        gate: whether all later stages wait for it, though they read nothing of it: a check whose failure makes their
            work useless.
        needs_nemo: whether its module imports NeMo, Megatron-Core or ModelOpt: the runner then activates the backend
            before it imports the module.
        runner: the module that `python -m` starts, with the stage's name.
    """

    name: str
    module: str
    sections: tuple[str, ...]
    inputs: Callable[[RunConfig], dict[str, Source]]
    ranks: Callable[[RunConfig], int] = _one
    wanted: Callable[[RunConfig], bool] = _always
    settings: Callable[[RunConfig], Mapping[str, Any]] = _no_settings
    folder: str | None = None
    trains: bool = False
    more_sections: Callable[[RunConfig], tuple[str, ...]] = _none
    libraries: Callable[[RunConfig], tuple[str, ...]] = _none
    shows: tuple[str, ...] = ()
    limits: Mapping[str, str] = field(default_factory=dict)
    tasks: Callable[[RunConfig], int] = _one
    gate: bool = False
    needs_nemo: bool = False
    runner: str = "recipes"

    @property
    def shares_work(self) -> bool:
        """Whether several processes that are started by themselves may work in its folder at once."""
        return self.tasks is not _one

    def configure(self, cfg: RunConfig) -> RunConfig:
        """The config as this stage sees it: a copy with the variant's settings."""
        return replace_values(cfg, self.settings(cfg))


def _teacher_hf(cfg: RunConfig) -> Source:
    if cfg.model.demo is not None:
        return Output("demo_model", HF)
    return External((str(cfg.model.hf_path),), cfg.model.revision, hub=True)


def _documents(cfg: RunConfig) -> dict[str, Source]:
    """The training sources by name, and `validation`, where it has documents of its own."""
    if cfg.data.train is None and cfg.data.sources is None:
        return {
            "train": Output("demo_model", "corpus/train.jsonl"),
            "validation": Output("demo_model", "corpus/validation.jsonl"),
        }
    documents: dict[str, Source] = {
        name: External(tuple(source.files), documents=True) for name, source in sources(cfg.data).items()
    }
    if cfg.data.validation is not None:
        documents["validation"] = External(tuple(cfg.data.validation), documents=True)
    if any(source.format is DocumentFormat.tokens for source in sources(cfg.data).values()):
        documents["source_tokenizer"] = External((cfg.data.source_tokenizer,), hub=True)
    return documents


def _search_inputs(cfg: RunConfig) -> dict[str, Source]:
    return {
        "teacher": Output("hf_to_nemo", NEMO),
        "data": Output("prepare_data"),
        "importance": Output("importance"),
    }


def _scoring_libraries(cfg: RunConfig) -> tuple[str, ...]:
    return ("lm_eval",) if cfg.evaluate.tasks or cfg.evaluate.continuations is not None else ()


def _is_scored(cfg: RunConfig) -> bool:
    return cfg.prune.tournament is not None and cfg.prune.tournament.score is not None


def _tournament_inputs(cfg: RunConfig) -> dict[str, Source]:
    inputs = {"teacher": _teacher(cfg), "data": Output("prepare_data"), "search": Output("search")}
    if _is_scored(cfg):
        inputs |= {"teacher_hf": _teacher_hf(cfg), **_task_folder(cfg)}
    return inputs


def _task_folder(cfg: RunConfig) -> dict[str, Source]:
    folder = cfg.evaluate.task_folder
    return {} if folder is None else {"task_folder": External((folder,))}


def _to_prune(cfg: RunConfig) -> Source:
    """What the last round prunes: the teacher, or what the round before it left."""
    rounds = len(cfg.prune.rounds)
    return Output(f"distill.round{rounds}" if rounds else "hf_to_nemo", NEMO)


def _importance_inputs(cfg: RunConfig) -> dict[str, Source]:
    return {"teacher": _to_prune(cfg), "data": Output("prepare_data")}


def _prune_inputs(cfg: RunConfig, suffix: str = "") -> dict[str, Source]:
    inputs = _importance_inputs(cfg)
    if needs_importance(cfg.prune):
        inputs["importance"] = Output(f"importance{suffix}")
    if cfg.prune.rounds:
        inputs["before"] = Output(f"prune.round{len(cfg.prune.rounds)}")
    if cfg.prune.budget is not None:
        inputs["choice"] = Output("search" if cfg.prune.tournament is None else "tournament")
    return inputs


def _calibration_ranks(cfg: RunConfig) -> int:
    return cfg.prune.pipeline_model_parallel_size


def _prune_ranks(cfg: RunConfig) -> int:
    return cfg.prune.pipeline_model_parallel_size * cfg.prune.tensor_model_parallel_size


def _distill_inputs(cfg: RunConfig) -> dict[str, Source]:
    distill = cfg.distill
    inputs: dict[str, Source] = {"student": Output("prune", NEMO), "data": Output("prepare_data")}
    # As the tournament trained: from the pruned student, with a teacher that runs beside it and stays the same.
    as_in_tournament = distill.runs_teacher and distill.swap_teacher_at_step is None and distill.init is Init.pruned
    if cfg.prune.tournament is not None and as_in_tournament:
        inputs["begun"] = Output("tournament", "winner")
    if distill.reads_signal:
        inputs["signal"] = Output("teacher_signal")
    elif distill.runs_teacher and distill.swap_teacher_at_step is not None:
        inputs["teacher"] = Output("hf_to_nemo", NEMO)
        inputs["corrected_teacher"] = Output("correct_teacher", NEMO)
    elif distill.runs_teacher:
        inputs["teacher"] = _teacher(cfg)
    return inputs


def _teacher(cfg: RunConfig) -> Source:
    """The teacher of the distillation. What is pruned is the original: correction does not change what is best to cut
    (Minitron in practice, arXiv 2408.11796)."""
    return Output("hf_to_nemo" if cfg.distill.correct_teacher is None else "correct_teacher", NEMO)


def _nemo_models(cfg: RunConfig) -> dict[str, Source]:
    """The NeMo checkpoints of a run that become Hugging Face folders, by the report's names; without the controls,
    which have stages of their own."""
    corrected: dict[str, Source] = (
        {} if cfg.distill.correct_teacher is None else {"corrected_teacher": Output("correct_teacher", NEMO)}
    )
    return {**corrected, "pruned": Output("prune", NEMO), "student": Output("distill", NEMO)}


def _evaluate_inputs(cfg: RunConfig) -> dict[str, Source]:
    inputs: dict[str, Source] = {"teacher": _teacher_hf(cfg), "data": Output("prepare_data")}
    inputs |= {name: Output("nemo_to_hf", name) for name in _nemo_models(cfg)}
    if cfg.evaluate.recovery:
        inputs["checkpoints"] = Output("distill", CHECKPOINTS)
    return inputs | _task_folder(cfg)


def _is_control(cfg: RunConfig, name: str) -> bool:
    return name in cfg.distill.controls


def _train_control(name: str, settings: Mapping[str, Any]) -> Stage:
    """A student that the report compares with the distilled one, trained without a teacher."""
    return Stage(
        f"distill.{name}",
        "recipes.distill",
        ("distill",),
        _distill_inputs,
        count_ranks,
        wanted=partial(_is_control, name=name),
        settings=lambda cfg: settings,
        trains=True,
        needs_nemo=True,
    )


def _export_control(name: str) -> Stage:
    return Stage(
        f"nemo_to_hf.{name}",
        "convert.nemo_to_hf",
        EXPORT,
        lambda cfg: {"hf_model": _teacher_hf(cfg), name: Output(f"distill.{name}", NEMO)},
        wanted=partial(_is_control, name=name),
        shows=ON_CARDS,
    )


def _evaluate_control(name: str) -> Stage:
    def inputs(cfg: RunConfig) -> dict[str, Source]:
        model = {name: Output(f"nemo_to_hf.{name}", name)}
        return {"teacher": _teacher_hf(cfg), "data": Output("prepare_data"), **model, **_task_folder(cfg)}

    return Stage(
        f"evaluate.{name}",
        "recipes.evaluate",
        ("evaluate",),
        inputs,
        count_ranks,
        wanted=partial(_is_control, name=name),
        settings=lambda cfg: {"evaluate.recovery": False},
        libraries=_scoring_libraries,
    )


def _report_inputs(cfg: RunConfig) -> dict[str, Source]:
    # Figures, not weights.
    read = ("*.json", "*.jsonl")
    return {stage.name: Output(stage.name, files=read) for stage in select_stages(cfg) if stage.name != "report"}


def _round(number: int) -> tuple[Stage, ...]:
    """The stages of a round of pruning before the last."""
    suffix = f".round{number}"
    settings = partial(round_settings, number=number)

    def is_wanted(cfg: RunConfig) -> bool:
        return len(cfg.prune.rounds) >= number

    def distill_inputs(cfg: RunConfig) -> dict[str, Source]:
        return {**_distill_inputs(cfg), "student": Output(f"prune{suffix}", NEMO)}

    return (
        Stage(
            f"importance{suffix}",
            "recipes.importance",
            CALIBRATION,
            _importance_inputs,
            _calibration_ranks,
            wanted=lambda cfg: is_wanted(cfg) and needs_importance(replace_values(cfg, settings(cfg)).prune),
            settings=settings,
            needs_nemo=True,
        ),
        Stage(
            f"prune{suffix}",
            "recipes.prune",
            ("prune",),
            partial(_prune_inputs, suffix=suffix),
            _prune_ranks,
            wanted=is_wanted,
            settings=settings,
            needs_nemo=True,
        ),
        Stage(
            f"distill{suffix}",
            "recipes.distill",
            ("distill",),
            distill_inputs,
            count_ranks,
            wanted=is_wanted,
            settings=settings,
            trains=True,
            needs_nemo=True,
        ),
    )


# How a candidate is exported, and asked a task: what else is evaluated does not concern the tournament.
SCORING = ("evaluate.continuations", "evaluate.num_fewshot", "evaluate.task_limit", "convert.export_dtype")
CALIBRATION = ("prune.calibration_samples", "prune.calibration_seq_length")
EXPORT = ("convert.export_dtype",)
# What a model card says of the run. A new name is no reason to write the weights again.
ON_CARDS = ("name", "model.name", "model.hf_path")
# A control has no teacher, so no setting of one may change it.
NO_TEACHER = {"distill.loss": Loss.ce, "distill.signal": TeacherSignal.live, "distill.swap_teacher_at_step": None}
CONTROLS: Mapping[str, Mapping[str, Any]] = {"ce": NO_TEACHER, "scratch": {**NO_TEACHER, "distill.init": Init.random}}

STAGES: tuple[Stage, ...] = (
    Stage(
        "demo_model",
        "recipes.demo_model",
        ("model",),
        lambda cfg: {},
        wanted=lambda cfg: cfg.model.demo is not None,
        trains=True,
        needs_nemo=True,
    ),
    Stage(
        "prepare_data",
        "recipes.prepare_data",
        ("data",),
        lambda cfg: {"tokenizer": _teacher_hf(cfg), **_documents(cfg)},
        limits={"data.max_bad_share": "worst_bad_share"},
        tasks=lambda cfg: cfg.data.array_tasks,
    ),
    Stage(
        "hf_to_nemo",
        "convert.hf_to_nemo",
        ("model.family", "convert.allow_pickle"),
        lambda cfg: {"hf_model": _teacher_hf(cfg)},
    ),
    Stage(
        "verify_import",
        "convert.verify",
        ("evaluate.verify_tokens",),
        lambda cfg: {
            "teacher_hf": _teacher_hf(cfg),
            "teacher_nemo": Output("hf_to_nemo", NEMO),
            "data": Output("prepare_data"),
        },
        wanted=_is_verified,
        gate=True,
        needs_nemo=True,
    ),
    Stage(
        "correct_teacher",
        "recipes.correct_teacher",
        ("distill.correct_teacher",),
        lambda cfg: {"teacher": Output("hf_to_nemo", NEMO), "data": Output("prepare_data")},
        count_ranks,
        wanted=lambda cfg: cfg.distill.correct_teacher is not None,
        trains=True,
        needs_nemo=True,
    ),
    *(stage for number in range(1, MOST_ROUNDS + 1) for stage in _round(number)),
    Stage(
        "importance",
        "recipes.importance",
        CALIBRATION,
        _importance_inputs,
        _calibration_ranks,
        wanted=lambda cfg: needs_importance(cfg.prune),
        needs_nemo=True,
    ),
    Stage(
        "search",
        "recipes.search",
        # Parallelism is placement elsewhere, but here a shape that it does not divide is no candidate.
        ("prune", "model.shape", "convert.export_dtype", "distill.parallel"),
        _search_inputs,
        lambda cfg: cfg.prune.pipeline_model_parallel_size,
        wanted=lambda cfg: cfg.prune.budget is not None,
        needs_nemo=True,
    ),
    Stage(
        "tournament",
        "recipes.tournament",
        ("prune", "distill"),
        _tournament_inputs,
        count_ranks,
        wanted=lambda cfg: cfg.prune.tournament is not None,
        trains=True,
        more_sections=lambda cfg: SCORING if _is_scored(cfg) else (),
        libraries=lambda cfg: ("lm_eval",) if _is_scored(cfg) else (),
        needs_nemo=True,
    ),
    Stage("prune", "recipes.prune", ("prune",), _prune_inputs, _prune_ranks, needs_nemo=True),
    Stage(
        "teacher_signal",
        "recipes.teacher_signal",
        (
            *("distill.max_steps", "distill.seq_length", "distill.global_batch_size", "distill.precision"),
            *("distill.float32_matmul_precision", "distill.kd.temperature", "distill.signal_top_k"),
        ),
        lambda cfg: {"teacher": _teacher(cfg), "data": Output("prepare_data")},
        count_ranks,
        wanted=lambda cfg: cfg.distill.reads_signal,
        trains=True,
        needs_nemo=True,
    ),
    Stage("distill", "recipes.distill", ("distill",), _distill_inputs, count_ranks, trains=True, needs_nemo=True),
    *(_train_control(name, settings) for name, settings in CONTROLS.items()),
    Stage(
        "nemo_to_hf",
        "convert.nemo_to_hf",
        EXPORT,
        lambda cfg: {"hf_model": _teacher_hf(cfg), **_nemo_models(cfg)},
        shows=ON_CARDS,
    ),
    *(_export_control(name) for name in CONTROLS),
    Stage(
        "verify",
        "convert.verify",
        ("evaluate.verify_tokens",),
        lambda cfg: {
            "student_hf": Output("nemo_to_hf", "student"),
            "student_nemo": Output("distill", NEMO),
            "data": Output("prepare_data"),
        },
        wanted=_is_verified,
        needs_nemo=True,
    ),
    Stage(
        "evaluate",
        "recipes.evaluate",
        ("evaluate",),
        _evaluate_inputs,
        count_ranks,
        libraries=_scoring_libraries,
    ),
    *(_evaluate_control(name) for name in CONTROLS),
    Stage(
        "benchmark",
        "recipes.benchmark",
        ("benchmark",),
        lambda cfg: {"teacher": _teacher_hf(cfg), "student": Output("nemo_to_hf", "student")},
        wanted=lambda cfg: cfg.benchmark.enabled,
        libraries=lambda cfg: ("vllm",) if cfg.benchmark.engine is Engine.vllm else (),
    ),
    Stage("report", "recipes.report", ("name", "benchmark.cost_per_hour"), _report_inputs, folder="report"),
)


def select_stages(cfg: RunConfig) -> list[Stage]:
    """The stages that a config asks for, in the order in which they can run."""
    return [stage for stage in STAGES if stage.wanted(cfg)]


def find(name: str) -> Stage:
    """The stage of that name. Raises: KeyError, naming those that there are."""
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise KeyError(f"no stage {name!r}; the stages are {', '.join(stage.name for stage in STAGES)}")
