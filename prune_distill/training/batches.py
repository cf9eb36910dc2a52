"""The batches of a training run: the sequences of each step, over all phases, and the data module for NeMo.

The batch of a step depends only on the number of the step. A run therefore resumes at the right position on any number
of ranks, and the documents of a batch can be listed later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from megatron.core import parallel_state
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.utils import Split
from megatron.core.num_microbatches_calculator import reconfigure_num_microbatches_calculator
from nemo.collections import llm
from nemo.lightning.data import WrappedDataLoader, add_megatron_sampler
from nemo.lightning.megatron_parallel import MegatronStep
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader, Dataset

from prune_distill.data.folder import DataFolder
from prune_distill.distillation.cached_logits_batch import SequenceSources, TeacherCaches, attach_cached_logits
from prune_distill.errors import InputError
from prune_distill.nemo import backend
from prune_distill.nemo.datasets import make_data_module
from prune_distill.pipeline.names import CHECKPOINTS
from prune_distill.pipeline.stage_main import rank
from prune_distill.schema import Packing, Training
from prune_distill.schema.phases import TrainingPhase, phase_number, samples_before, spare_batches, training_phases

# A sequence: the number of its dataset, and its number in that dataset.
SequenceId = tuple[int, int]


class Batches(LightningDataModule):
    """NeMo data module for a training run in phases.

    NeMo's own module (nemo/collections/llm/gpt/data/pre_training.py) has a single sequence length and global batch
    size, and miscounts the consumed samples of a resumed run with other sizes.

    Each phase has its own dataset, in its own order. Steps that skip their batch (`cfg.skip_steps`) read from an extra
    dataset, so that the batches of all other steps stay the same.

    Args:
        tokenizer: the model's tokenizer, as NeMo wraps it.
        out: the stage's folder, for Megatron's index of sequences.
        cached_logits: cached logits of the sequences of a run with one phase, which are added to its batches.
    """

    def __init__(
        self,
        tokenizer: Any,
        data: DataFolder,
        out: Path,
        cfg: Training,
        seed: int,
        cached_logits: TeacherCaches | None = None,
    ) -> None:
        super().__init__()
        self.cached_logits = cached_logits
        self.tokenizer, self.data, self.out, self.cfg, self.seed = tokenizer, data, out, cfg, seed
        self.phases = training_phases(cfg)
        self.spares = spare_batches(cfg)
        self.datasets: list[Any] = []
        sizes = (cfg.seq_length, cfg.micro_batch_size, cfg.global_batch_size)
        # Cut anywhere, like the sequences that the stage evaluate measures.
        self.validation = self._module(data, seed, *sizes, Packing.concatenated)
        self.data_sampler = StepSizes(self)

    def setup(self, stage: str = "") -> None:
        """Build the datasets. Lightning calls it on every rank."""
        _select_split(self.validation, Split.valid)
        self.validation.trainer = self.trainer
        self.validation.setup()
        self.datasets = [self.sequences(number) for number in range(len(self.phases))]
        for place, phase in enumerate(self.phases, start=len(self.phases)):
            spare = [batch for where, batch in self.spares.values() if where == place]
            # A seed that no phase uses; otherwise a spare batch could be the skipped one.
            self.datasets.append(self._dataset(phase, max(spare) + 1, self.seed + place) if spare else None)

    def sequences(self, number: int) -> Any:
        """Build the dataset of a phase, with its sequences in the order of the steps."""
        phase = self.phases[number]
        return self._dataset(phase, phase.steps, self.seed + number)

    def sources(self, dataset: Any, number: int) -> SequenceSources:
        """Return the sources of the sequences of a phase.

        Each part of the training documents, and so of a source, is a Megatron dataset of its own, within which
        documents are concatenated and shuffled (blended_megatron_dataset_builder.py:280): a sequence never mixes parts.
        The blend only chooses a part for each sequence (blended_dataset.py:92-94, with the indices of
        helpers.cpp:build_blending_indices); a single part is not blended (blended_megatron_dataset_builder.py:244).

        Args:
            dataset: the phase's, from `sequences`.
        """
        phase = self.phases[number]
        count = phase.steps * phase.global_batch_size
        names = {str(self.data.folder / part["prefix"]): part["source"] for part in self.data.train}
        if not isinstance(dataset, BlendedDataset):
            return SequenceSources([names[dataset.dataset_path]], np.zeros(count, dtype=np.int16))
        return SequenceSources([names[part.dataset_path] for part in dataset.datasets], dataset.dataset_index[:count])

    def _dataset(self, phase: TrainingPhase, steps: int, seed: int) -> Any:
        data = self.data if phase.weights is None else self.data.weighted(phase.weights)
        sizes = (phase.seq_length, phase.micro_batch_size, phase.global_batch_size)
        module = self._module(data, seed, *sizes, self.cfg.packing)
        _select_split(module, Split.train)
        module.build(steps, steps, 1, 0)
        return module._train_ds

    def _module(
        self,
        data: DataFolder,
        seed: int,
        seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        packing: Packing,
    ) -> llm.PreTrainingDataModule:
        return make_data_module(
            self.tokenizer,
            data,
            self.out,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            num_workers=self.cfg.num_workers,
            seed=seed,
            packing=packing,
        )

    def reconfigure_limit_batches(self) -> None:
        """Convert `trainer.limit_val_batches` to micro batches, which NeMo's loops count."""
        self.validation.reconfigure_limit_batches()

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the micro batches of this rank, starting from the trainer's current step."""
        datasets = self.datasets
        if self.cached_logits is not None:
            (phase,) = self.phases
            datasets = [
                attach_cached_logits(datasets[0], self.cached_logits, phase.seq_length, self.sources(datasets[0], 0))
            ]
        return WrappedDataLoader(
            mode="train",
            dataset=ConcatenatedDatasets(datasets),
            batch_sampler=MicroBatches(self, self.trainer.global_step),
            num_workers=self.cfg.num_workers,
            pin_memory=True,
            persistent_workers=self.cfg.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the batches of the validation set, in the sizes of the run in every phase."""
        return self.validation.val_dataloader()

    def first_validation(self) -> dict[str, torch.Tensor]:
        """Return the first micro batch of the validation set, the same on all ranks; each column is `[b, s]`."""
        dataset = self.validation._validation_ds
        items = [dataset[n] for n in range(min(self.cfg.micro_batch_size, len(dataset)))]
        return {name: torch.stack([item[name] for item in items]) for name in ("tokens", "labels")}

    def places(self, step: int) -> list[SequenceId]:
        """List the sequences of the global batch of a step, counted from 0."""
        number = phase_number(self.phases, step)
        phase = self.phases[number]
        where, batch = self.spares.get(step, (number, step - phase.first_step))
        return [(where, batch * phase.global_batch_size + n) for n in range(phase.global_batch_size)]

    def documents(self, step: int) -> list[int]:
        """List the training documents in the batch of a step, by number in the data folder, from 0."""
        first, before = {}, 0
        for part in self.data.train:
            first[str(self.data.folder / part["prefix"])] = before
            before += part["documents"]
        found: set[int] = set()
        for where, sample in self.places(step):
            dataset = self.datasets[where]
            if isinstance(dataset, BlendedDataset):
                place = dataset.dataset_sample_index[sample]
                dataset, sample = dataset.datasets[dataset.dataset_index[sample]], place
            _, documents = dataset._query_document_sample_shuffle_indices(sample)
            found.update(first[dataset.dataset_path] + int(document) for document in documents)
        return sorted(found)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, and the sizes that it depends on."""
        return {"consumed_samples": samples_before(self.phases, self.trainer.global_step), "sizes": self._sizes()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Reject a checkpoint with other sizes, whose position in the data would differ.

        Raises:
            InputError: states the sizes of both.
        """
        if state_dict["sizes"] != self._sizes():
            raise InputError(
                f"the checkpoint in {self.out / CHECKPOINTS} has steps, sequence length and global batch size"
                f" {state_dict['sizes']}, and this run has {self._sizes()}; restore the old values, or remove the"
                " checkpoint"
            )

    def _sizes(self) -> list[list[int]]:
        return [[phase.steps, phase.seq_length, phase.global_batch_size] for phase in self.phases]


def _select_split(module: llm.PreTrainingDataModule, split: Split) -> None:
    """Restrict a data module to one split; the others are None (blended_megatron_dataset_builder.py:237)."""
    blends = module.build_kwargs["blend_per_split"]
    module.build_kwargs["blend_per_split"] = [blend if n == split.value else None for n, blend in enumerate(blends)]


class ConcatenatedDatasets(Dataset):  # type: ignore[type-arg]
    """Several datasets as one, indexed by `SequenceId`."""

    def __init__(self, datasets: list[Any]) -> None:
        self.datasets = datasets

    def __getitem__(self, place: SequenceId) -> dict[str, Any]:
        where, sample = place
        item: dict[str, Any] = self.datasets[where][sample]
        return item


class MicroBatches:
    """The micro batches of a data-parallel rank, assigned as by Megatron's sampler (nemo/lightning/data.py:349)."""

    def __init__(self, batches: Batches, first_step: int) -> None:
        self.batches, self.first_step = batches, first_step
        self.rank = parallel_state.get_data_parallel_rank()
        self.ranks = parallel_state.get_data_parallel_world_size()

    def __len__(self) -> int:
        """Return the number of micro batches of the whole run: Lightning also counts those of earlier processes."""
        sizes = [(phase.steps * phase.global_batch_size, phase.micro_batch_size) for phase in self.batches.phases]
        return sum(sequences // (micro * self.ranks) for sequences, micro in sizes)

    def __iter__(self) -> Iterator[list[SequenceId]]:
        phases = self.batches.phases
        for step in range(self.first_step, phases[-1].end):
            micro = phases[phase_number(phases, step)].micro_batch_size
            places = self.batches.places(step)
            for start in range(self.rank * micro, len(places), micro * self.ranks):
                yield places[start : start + micro]


class StepSizes(MegatronDataSampler):
    """Tells NeMo and Megatron the sizes of the current batch: those of the phase, or those of validation."""

    def __init__(self, batches: Batches) -> None:
        cfg = batches.cfg
        super().__init__(cfg.seq_length, cfg.micro_batch_size, cfg.global_batch_size)
        self.batches = batches

    def transform_dataloader(self, dataloader: DataLoader[Any], consumed_samples: int = 0) -> DataLoader[Any]:
        """Add Megatron's sampler to the validation batches. Training batches have their own sampler."""
        if dataloader.mode == "train":  # type: ignore[attr-defined]
            return dataloader
        cfg = self.batches.cfg
        sampled: DataLoader[Any] = add_megatron_sampler(
            dataloader,
            micro_batch_size=cfg.micro_batch_size,
            global_batch_size=cfg.global_batch_size,
            dataloader_mode="validation",
            rank=parallel_state.get_data_parallel_rank(),
            world_size=parallel_state.get_data_parallel_world_size(),
        )
        return sampled

    def compute_consumed_samples(self, steps_since_resume: int = 0) -> int:
        """Return the number of sequences that training has read."""
        return samples_before(self.batches.phases, self.trainer.global_step)

    def on_megatron_step_start(self, step: MegatronStep[Any, Any]) -> MegatronStep[Any, Any]:
        """Tell the loss how many unmasked tokens the global batch of a training step has.

        With masks, each rank reads all its batches of the step in advance: a few MB of tokens.
        """
        step = super().on_megatron_step_start(step)
        if step.forward_only:
            return step
        learned = float(self.micro_batch_size * self.seq_len)
        if self.batches.data.masked or self.batches.cfg.packing is Packing.documents:
            micro_batches = [next(step.data) for _ in range(step.num_microbatches or 0)]
            learned = _count_unmasked(micro_batches) / len(micro_batches)
            step = dataclasses.replace(step, data=iter(micro_batches))
        self.trainer.lightning_module.training_loss_reduction.learned = max(learned, 1.0)
        return step

    def use(self, seq_length: int, micro_batch_size: int, global_batch_size: int) -> None:
        """Set the sizes of the next batches, on every rank."""
        if (seq_length, micro_batch_size, global_batch_size) == self._current():
            return
        self.seq_len, self.micro_batch_size, self.global_batch_size = seq_length, micro_batch_size, global_batch_size
        reconfigure_num_microbatches_calculator(
            rank(), None, global_batch_size, micro_batch_size, parallel_state.get_data_parallel_world_size()
        )

    def _current(self) -> tuple[int, int, int]:
        return self.seq_len, self.micro_batch_size, self.global_batch_size


def _count_unmasked(micro_batches: list[Any]) -> float:
    """Return the number of unmasked tokens in a rank's micro batches, averaged over data-parallel ranks."""
    columns = [batch[0] if isinstance(batch, tuple) else batch for batch in micro_batches]
    tokens = torch.stack([batch["loss_mask"].sum() for batch in columns]).sum().double()
    tokens = tokens.to(backend.activate().device)
    # Context-parallel ranks load the same full sequences.
    torch.distributed.all_reduce(tokens, group=parallel_state.get_data_parallel_group())
    return float(tokens) / parallel_state.get_data_parallel_world_size()


class UsePhase(Callback):
    """Sets the batch sizes of each step's phase and of validation, and marks the last batch, after which Lightning
    validates.

    Lightning detects the last batch only in a run that was not resumed: it adds the steps of earlier processes to a
    count of micro batches (lightning/pytorch/loops/training_epoch_loop.py:182 and :266).
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        phases = self.batches.phases
        phase = phases[phase_number(phases, trainer.global_step)]
        self.batches.data_sampler.use(phase.seq_length, phase.micro_batch_size, phase.global_batch_size)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= self.batches.cfg.max_steps:
            trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = True

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        cfg = self.batches.cfg
        self.batches.data_sampler.use(cfg.seq_length, cfg.micro_batch_size, cfg.global_batch_size)
