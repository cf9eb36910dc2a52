"""Evaluate the models of a run. Each measurement is stored, so that an interrupted evaluation resumes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from prune_distill.config.values import OWN_TASK
from prune_distill.data.folder import DataFolder
from prune_distill.data.hf_tokenizer import load_tokenizer
from prune_distill.errors import InputError
from prune_distill.evaluation.continuations import write_task
from prune_distill.evaluation.engine import score_folder
from prune_distill.evaluation.generation import Prompts, build_samples, generate_continuations
from prune_distill.evaluation.harness import Harness, versions
from prune_distill.evaluation.heldout import Logits, measure_heldout, measure_served
from prune_distill.evaluation.results import ModelEntry, SampleTexts, TaskScores
from prune_distill.evaluation.store import Store
from prune_distill.nemo import hf_models, ranks
from prune_distill.pipeline.names import MEASURED
from prune_distill.pipeline.stage_main import rank
from prune_distill.quantization import reader
from prune_distill.schema import Engine, RunConfig

log = logging.getLogger("recipes.evaluate")

TEACHER = "teacher"
HELD_OUT = "held_out"
SAMPLES = "samples"
FIX = "use a machine with more memory, or lower evaluate.micro_batch_size or evaluate.seq_length"


class Evaluator:
    """Measures models and compares them with their teacher. All ranks must make the same calls.

    Args:
        data: prepared documents.
        teacher: Hugging Face folder of the teacher.
        out: folder for the measurements and for the task from held-out documents.
        task_folder: the user's task definitions and data.
        original: Hugging Face folder of the model that is pruned, whose tokenizer all models get; None: the teacher.
            Both have the same ids, but may differ in the tokens that they add to a text.
    """

    def __init__(
        self,
        cfg: RunConfig,
        data: DataFolder,
        teacher: Path,
        out: Path,
        task_folder: Path | None,
        original: Path | None = None,
    ) -> None:
        self.cfg, self.data, self.teacher_folder = cfg, data, teacher
        self.tokenizer_folder = teacher if original is None else original
        self.own = None if cfg.evaluate.continuations is None else (out / "tasks").resolve()
        folder = None if task_folder is None else Path(task_folder).resolve()
        self.harness = Harness(cfg.evaluate, self.own, OWN_TASK, folder)
        self.store = Store(out / MEASURED, versions(self.harness.tasks))

    def measure(self, name: str, folder: Path | Callable[[], Path], samples: bool = True) -> ModelEntry:
        """Measure a model: sizes, held-out loss, agreement with the teacher, tasks.

        Args:
            folder: the model's Hugging Face folder, or a function that makes it, called if a measurement is missing.
            samples: whether to generate continuations for `samples`.

        Returns:
            The model's entry in `evaluation.json`; `tasks_failed`: reasons why tasks could not be measured, by name.

        Raises:
            InputError: there are too few documents, or a model does not fit in memory.
        """
        with self.store.locked(name) if rank() == 0 else contextlib.nullcontext():
            model = _Lazy(lambda: self.teacher) if name == TEACHER else _Lazy(lambda: self._load(folder))
            if isinstance(folder, Path) and self._is_served(folder):
                self._once(name, HELD_OUT, lambda: self._held_out_served(name, folder))
            else:
                self._once(name, HELD_OUT, lambda: self._held_out(name, model.get()))
            failed: dict[str, str] = {}
            for task in self.harness.tasks:
                fault = None if self._known(name, _part(task)) else self._task_fault(task)
                if fault is not None:
                    failed[task] = fault
                else:
                    self._once(name, _part(task), lambda task=task: self._task(name, task, model.get()))  # type: ignore[misc]
            if samples and self.cfg.evaluate.samples:
                self._once(name, SAMPLES, lambda: self._samples(model.get()))
        entry: ModelEntry = ranks.broadcast(self.recall(name))
        if failed:
            entry["tasks_failed"] = failed
        return entry

    def score(self, name: str, folder: Callable[[], Path], task: str) -> dict[str, TaskScores]:
        """Return a model's scores on one task, which is measured once.

        Raises:
            InputError: the task cannot be loaded, or a model does not fit in memory.
        """
        fault = None if self._known(name, _part(task)) else self._task_fault(task)
        if fault is not None:
            raise InputError(f"task {task}: {fault}")
        self._once(name, _part(task), lambda: self._task(name, task, self._load(folder)))
        found: dict[str, TaskScores] = ranks.broadcast(self.store.get(name, _part(task)))
        return found

    def recall(self, name: str) -> ModelEntry | None:
        """Return the stored measurements of a model; None if there are none."""
        entry: ModelEntry | None = self.store.get(name, HELD_OUT)
        if entry is None:
            return None
        tasks: dict[str, TaskScores] = {}
        for task in self.harness.tasks:
            tasks |= self.store.get(name, _part(task)) or {}
        if tasks:
            entry["tasks"] = tasks
        return entry

    def samples(self, models: Sequence[str]) -> list[SampleTexts]:
        """Return the content of `samples.json` for models that were measured."""
        texts = {name: self.store.get(name, SAMPLES) for name in models}
        return build_samples(
            self.tokenizer, self._prompts, {name: own for name, own in texts.items() if own is not None}
        )

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.tokenizer_folder)

    @cached_property
    def teacher(self) -> Any:
        return self._load(self.teacher_folder)

    @cached_property
    def _teacher_logits(self) -> Logits:
        return Logits(self.teacher, keep=True)

    @cached_property
    def _prompts(self) -> Prompts:
        return Prompts.read(self.data, self.cfg.evaluate)

    def _load(self, folder: Path | Callable[[], Path]) -> Any:
        found = folder() if callable(folder) else folder
        evaluate = self.cfg.evaluate
        # Logits of two models for a batch, with two bytes each.
        logits = 2 * 2 * evaluate.micro_batch_size * evaluate.seq_length * self.data.vocab_size
        quantized = reader.is_quantized(found)
        size = reader.dequantized_bytes(found) if quantized else hf_models.weight_bytes(found)
        hf_models.check_fits([("model", size), ("logits", logits)], FIX)
        return reader.load(found) if quantized else hf_models.load(found)

    def _known(self, name: str, part: str) -> bool:
        return bool(ranks.broadcast(self.store.get(name, part) is not None))

    def _once(self, name: str, part: str, work: Callable[[], Any]) -> None:
        """Make a missing measurement on all ranks; rank 0 stores it."""
        if not self._known(name, part):
            result = work()
            if rank() == 0:
                self.store.put(name, part, result)

    def _is_served(self, folder: Path) -> bool:
        return self.cfg.evaluate.engine is Engine.vllm and reader.is_quantized(folder)

    def _held_out_served(self, name: str, folder: Path) -> ModelEntry:
        # Before the teacher takes memory.
        served, engine = score_folder(folder, self.data, self.cfg)
        config = reader.read_config(folder)
        result = measure_served(served, self._teacher_logits, config.vocab_size, self.data, self.cfg.evaluate)
        log.info("%s: held-out loss %.4f nats per token with %s", name, result["val_loss"], engine)
        return {**hf_models.describe(config, reader.count_parameters(config)), **result, "engine": engine}

    def _held_out(self, name: str, model: Any) -> ModelEntry:
        teacher = None if name == TEACHER else self._teacher_logits
        logits = self._teacher_logits if name == TEACHER else Logits(model)
        result = measure_heldout(logits, teacher, self.data, self.cfg.evaluate)
        log.info("%s: held-out loss %.4f nats per token", name, result["val_loss"])
        return {**hf_models.describe(model.config, model.num_parameters()), **result}

    def _task_fault(self, task: str) -> str | None:
        if task == OWN_TASK and task not in self.harness.checked:
            self._write_own_task()
        return self.harness.fault(task)

    def _write_own_task(self) -> None:
        cfg = self.cfg.evaluate.continuations
        assert cfg is not None
        assert self.own is not None
        if rank() == 0:
            documents = [self.tokenizer.decode(ids[:-1]) for ids in self.data.validation_documents_ids()]
            write_task(documents, cfg, self.cfg.seed, self.own)
        ranks.wait()

    def _task(self, name: str, task: str, model: Any) -> dict[str, TaskScores] | None:
        result = self.harness.measure(task, model, self.tokenizer)
        for entry, metrics in (result or {}).items():
            log.info("%s: %s %s", name, entry, _words(metrics))
        return result

    def _samples(self, model: Any) -> list[str]:
        return generate_continuations(model, self.tokenizer, self._prompts, self.cfg.evaluate.sample_new_tokens)


class _Lazy:
    """A model that is loaded on first use."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self._model: Any = None

    def get(self) -> Any:
        if self._model is None:
            self._model = self._load()
        return self._model


def _part(task: str) -> str:
    return f"task.{task}"


def _words(scores: TaskScores) -> str:
    values = [f"{name} {metric['value']:.4f}" for name, metric in scores.items() if not isinstance(metric, int)]
    return f"{', '.join(values)} ({scores['samples']} questions)"
