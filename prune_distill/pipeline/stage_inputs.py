"""The inputs of each stage by name, for a config: outputs of other stages, or files of the user. No torch, no NeMo.

A stage's module has a dataclass `Inputs` with a field for each name; names that depend on the config are keys of one
field.
"""

from __future__ import annotations

from prune_distill.config.data_files import sources
from prune_distill.model.student import needs_importance
from prune_distill.pipeline.names import (
    CHECKPOINTS,
    CONTEXT,
    CORPUS_TRAIN,
    CORPUS_VALIDATION,
    DISTILLED,
    HF,
    NEMO,
    TOKENIZER,
    WINNER,
    cache_stage,
    cached_logits_name,
    quantized_name,
)
from prune_distill.pipeline.stage import External, Output, Source
from prune_distill.schema import DocumentFormat, Engine, Init, QuantFormat, RunConfig

IMPORTED = Output("hf_to_nemo", NEMO)
STUDENT_TOKENIZER = Output("hf_to_nemo", f"{NEMO}/{CONTEXT}/{TOKENIZER}")
IMPORTED_TEACHER = Output("hf_to_nemo.teacher", NEMO)
DATA = Output("prepare_data")

Sources = dict[str, Source]


def original_hf(cfg: RunConfig) -> Source:
    """Return the Hugging Face folder or Hub id of the model that is pruned."""
    if cfg.model.demo is not None:
        return Output("demo_model", HF)
    return External((str(cfg.model.hf_path),), cfg.model.revision, hub=True)


def teacher_hf(cfg: RunConfig) -> Source:
    """Return the teacher's Hugging Face folder or Hub id: the model that is pruned, or one of its own."""
    if not cfg.has_own_teacher:
        return original_hf(cfg)
    return External((str(cfg.teacher.hf_path),), cfg.teacher.revision, hub=True)


def source_teacher_hf(cfg: RunConfig, number: int) -> Source:
    """Return the Hugging Face folder or Hub id of a teacher of single sources."""
    teacher = cfg.source_teachers[number - 1]
    return External((str(teacher.hf_path),), teacher.revision, hub=True)


def imported_source_teacher(number: int) -> Output:
    return Output(f"hf_to_nemo.source_teacher{number}", NEMO)


def prepare_data_inputs(cfg: RunConfig) -> Sources:
    return {"tokenizer": original_hf(cfg), **_documents(cfg)}


def _documents(cfg: RunConfig) -> Sources:
    """Return the training sources by name, and `validation`, if it has its own documents."""
    if cfg.data.train is None and cfg.data.sources is None:
        return {"train": Output("demo_model", CORPUS_TRAIN), "validation": Output("demo_model", CORPUS_VALIDATION)}
    documents: Sources = {
        name: External(tuple(source.files), documents=True) for name, source in sources(cfg.data).items()
    }
    if cfg.data.validation is not None:
        documents["validation"] = External(tuple(cfg.data.validation), documents=True)
    if any(source.format is DocumentFormat.tokens for source in sources(cfg.data).values()):
        documents["source_tokenizer"] = External((cfg.data.source_tokenizer,), hub=True)
    return documents


def hf_to_nemo_inputs(cfg: RunConfig) -> Sources:
    return {"hf_model": original_hf(cfg)}


def import_teacher_inputs(cfg: RunConfig) -> Sources:
    return {"hf_model": teacher_hf(cfg), "student_tokenizer": STUDENT_TOKENIZER}


def import_source_teacher_inputs(cfg: RunConfig, number: int) -> Sources:
    return {"hf_model": source_teacher_hf(cfg, number), "student_tokenizer": STUDENT_TOKENIZER}


def verify_import_inputs(cfg: RunConfig) -> Sources:
    return {"teacher_hf": original_hf(cfg), "teacher_nemo": IMPORTED, "data": DATA}


def verify_teacher_inputs(cfg: RunConfig) -> Sources:
    return {"teacher_hf": teacher_hf(cfg), "teacher_nemo": IMPORTED_TEACHER, "data": DATA}


def verify_source_teacher_inputs(cfg: RunConfig, number: int) -> Sources:
    return {"teacher_hf": source_teacher_hf(cfg, number), "teacher_nemo": imported_source_teacher(number), "data": DATA}


def correct_teacher_inputs(cfg: RunConfig) -> Sources:
    return {"teacher": _imported_teacher(cfg), "data": DATA}


def importance_inputs(cfg: RunConfig) -> Sources:
    return {"teacher": _to_prune(cfg), "data": DATA}


def _to_prune(cfg: RunConfig) -> Source:
    """Return the model that the last round prunes: the teacher, or the result of the previous round."""
    rounds = len(cfg.prune.rounds)
    return Output(f"distill.round{rounds}", NEMO) if rounds else IMPORTED


def search_inputs(_: RunConfig) -> Sources:
    return {"teacher": IMPORTED, "data": DATA, "importance": Output("importance")}


def is_scored(cfg: RunConfig) -> bool:
    """Return whether successive halving also ranks by a task."""
    return cfg.prune.successive_halving is not None and cfg.prune.successive_halving.score is not None


def successive_halving_inputs(cfg: RunConfig) -> Sources:
    inputs = {"teacher": _teacher(cfg), "data": DATA, "search": Output("search")}
    if is_scored(cfg):
        inputs |= {"teacher_hf": original_hf(cfg), **_task_folder(cfg)}
    return inputs


def _task_folder(cfg: RunConfig) -> Sources:
    folder = cfg.evaluate.task_folder
    return {} if folder is None else {"task_folder": External((folder,))}


def prune_inputs(cfg: RunConfig, suffix: str = "") -> Sources:
    inputs = importance_inputs(cfg)
    if needs_importance(cfg.prune):
        inputs["importance"] = Output(f"importance{suffix}")
    if cfg.prune.rounds:
        inputs["before"] = Output(f"prune.round{len(cfg.prune.rounds)}")
    if cfg.prune.budget is not None:
        inputs["choice"] = Output("search" if cfg.prune.successive_halving is None else "successive_halving")
    return inputs


def _imported_teacher(cfg: RunConfig) -> Source:
    return IMPORTED_TEACHER if cfg.has_own_teacher else IMPORTED


def _teacher(cfg: RunConfig) -> Source:
    """Return the teacher of the distillation. The original is pruned, because correction does not change which parts
    are best to prune (Minitron in practice, arXiv 2408.11796)."""
    return _imported_teacher(cfg) if cfg.distill.teacher_correction is None else Output("correct_teacher", NEMO)


def cache_logits_inputs(cfg: RunConfig) -> Sources:
    return {"teacher": _teacher(cfg), "data": DATA}


def cache_source_teacher_inputs(_: RunConfig, number: int) -> Sources:
    return {"teacher": imported_source_teacher(number), "data": DATA}


def _cached_logits(cfg: RunConfig) -> Sources:
    """Return the caches of all teachers. The name of each is that of `cached_logits_name`."""
    numbers = sorted({*cfg.teacher_numbers.values()} or {0})
    return {cached_logits_name(number): Output(cache_stage(number)) for number in numbers}


def distill_inputs(cfg: RunConfig, suffix: str = "") -> Sources:
    distill = cfg.distill
    inputs: Sources = {"student": Output(f"prune{suffix}", NEMO), "data": DATA}
    # As in successive halving: from the pruned student, with a teacher that runs along and does not change.
    as_in_halving = distill.runs_teacher and distill.swap_teacher_at_step is None and distill.init is Init.pruned
    if cfg.prune.successive_halving is not None and as_in_halving:
        inputs["winner"] = Output("successive_halving", WINNER)
    if distill.reads_cached_logits:
        inputs |= _cached_logits(cfg)
    elif distill.runs_teacher and distill.swap_teacher_at_step is not None:
        inputs["teacher"] = _imported_teacher(cfg)
        inputs["corrected_teacher"] = Output("correct_teacher", NEMO)
    elif distill.runs_teacher:
        inputs["teacher"] = _teacher(cfg)
    return inputs


def last_distillation(cfg: RunConfig, before_round: int | None = None) -> str:
    """Return the stage that trains the student last, or last before an on-policy round."""
    rounds = 0 if cfg.distill.on_policy is None else cfg.distill.on_policy.rounds
    number = rounds if before_round is None else before_round - 1
    return f"distill.on_policy{number}" if number else "distill"


def export_on_policy_inputs(cfg: RunConfig, number: int) -> Sources:
    return {"hf_model": original_hf(cfg), "student": Output(last_distillation(cfg, number), NEMO)}


def generate_inputs(cfg: RunConfig, number: int) -> Sources:
    inputs: Sources = {"student": Output(f"nemo_to_hf.on_policy{number}", "student"), "data": DATA}
    if cfg.distill.on_policy is not None and cfg.distill.on_policy.prompts is not None:
        inputs["prompts"] = External(tuple(cfg.distill.on_policy.prompts), documents=True)
    return inputs


def cache_on_policy_inputs(cfg: RunConfig, number: int) -> Sources:
    return {**cache_logits_inputs(cfg), "completions": Output(f"generate.on_policy{number}")}


def distill_on_policy_inputs(cfg: RunConfig, number: int) -> Sources:
    inputs = distill_inputs(cfg)
    inputs.pop("winner", None)
    if "cached_logits" in inputs:
        inputs["cached_logits"] = Output(f"cache_logits.on_policy{number}")
    student = Output(last_distillation(cfg, number), NEMO)
    return {**inputs, "student": student, "completions": Output(f"generate.on_policy{number}")}


def nemo_to_hf_inputs(cfg: RunConfig) -> Sources:
    return {"hf_model": original_hf(cfg), **_nemo_models(cfg)}


def _nemo_models(cfg: RunConfig) -> Sources:
    """Return the NeMo checkpoints of a run to export, by the report's names. Controls have their own stages, and so has
    a corrected teacher that is not the original's size."""
    exports_teacher = cfg.distill.teacher_correction is not None and not cfg.has_own_teacher
    corrected: Sources = {"corrected_teacher": _teacher(cfg)} if exports_teacher else {}
    return {**corrected, "pruned": Output("prune", NEMO), "student": Output(last_distillation(cfg), NEMO)}


def export_teacher_inputs(cfg: RunConfig) -> Sources:
    return {"hf_model": teacher_hf(cfg), "corrected_teacher": _teacher(cfg)}


def export_control_inputs(cfg: RunConfig, name: str) -> Sources:
    return {"hf_model": original_hf(cfg), name: Output(f"distill.{name}", NEMO)}


def verify_inputs(cfg: RunConfig) -> Sources:
    student = Output(last_distillation(cfg), NEMO)
    return {"student_hf": Output("nemo_to_hf", "student"), "student_nemo": student, "data": DATA}


def _teacher_and_data(cfg: RunConfig) -> Sources:
    """Return what every evaluation reads. `original`: the model that is pruned, if it is not the teacher."""
    original = {"original": original_hf(cfg)} if cfg.has_own_teacher else {}
    return {"teacher": teacher_hf(cfg), **original, "data": DATA}


def evaluate_inputs(cfg: RunConfig) -> Sources:
    inputs = _teacher_and_data(cfg)
    if cfg.has_own_teacher and cfg.distill.teacher_correction is not None:
        inputs["corrected_teacher"] = Output("nemo_to_hf.teacher", "corrected_teacher")
    inputs |= {name: Output("nemo_to_hf", name) for name in _nemo_models(cfg)}
    if cfg.distill.on_policy is not None:
        inputs[DISTILLED] = Output("nemo_to_hf.on_policy1", "student")
    if cfg.evaluate.recovery:
        inputs["checkpoints"] = Output("distill", CHECKPOINTS)
    return inputs | _task_folder(cfg)


def evaluate_control_inputs(cfg: RunConfig, name: str) -> Sources:
    model = {name: Output(f"nemo_to_hf.{name}", name)}
    return {**_teacher_and_data(cfg), **model, **_task_folder(cfg)}


def benchmark_inputs(cfg: RunConfig) -> Sources:
    models: Sources = {cfg.original_name: original_hf(cfg), "student": Output("nemo_to_hf", "student")}
    # transformers would dequantize them.
    served = cfg.quantize.formats if cfg.benchmark.engine is Engine.vllm else []
    return models | {quantized_name(found): _quantized(found) for found in served}


def _quantized(quant_format: QuantFormat) -> Output:
    return Output(f"quantize.{quant_format.value}", quantized_name(quant_format))


def quantize_inputs(_: RunConfig) -> Sources:
    return {"student": Output("nemo_to_hf", "student"), "data": DATA}


def evaluate_quantized_inputs(cfg: RunConfig, quant_format: QuantFormat) -> Sources:
    model = {quantized_name(quant_format): _quantized(quant_format)}
    return {**_teacher_and_data(cfg), **model, **_task_folder(cfg)}
