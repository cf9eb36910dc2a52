"""One training run through NeMo: the demo's teacher, distillation and its controls all come through `train`.

It resumes from the newest complete checkpoint under `OUT/checkpoints`, appends to `OUT/metrics.jsonl`, and ends with
the model in `OUT/nemo`.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.lightning.ckpt_utils import ckpt_to_context_subdir
from nemo.lightning.io.pl import TrainerContext, ckpt_to_weights_subdir
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler, MegatronOptimizerModule
from nemo.lightning.pytorch.trainer import configure_no_restart_validation_training_loop

from conf.errors import ConfigError, InputError
from conf.schema import Precision, Recompute, Training
from recipes.runtime import backend, nemo_api
from recipes.runtime.data.folder import DataFolder
from recipes.runtime.metrics_file import MetricsFile, read_metrics
from recipes.runtime.signal import SignalReader
from recipes.runtime.stage_main import PausedError, rank, world_size
from recipes.runtime.stop_file import StopFile

log = logging.getLogger("recipes.training")


def train(
    model: llm.GPTModel,
    cfg: Training,
    data: DataFolder,
    out: Path,
    *,
    seed: int,
    start: Path | None,
    signal: SignalReader | None = None,
    validate_first: bool = False,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Trains a model for `cfg.max_steps` optimizer steps and leaves it in `out/nemo`.

    Args:
        model: an unconfigured NeMo model with its tokenizer.
        data: prepared documents, train and validation.
        start: the NeMo checkpoint whose weights training starts from; None: from random ones.
        signal: the teacher's stored signal on the training sequences, for a model whose `data_step` takes it.
        callbacks: further ones of Lightning's.
        validate_first: takes the validation loss before the first step as well.

    Returns:
        backend, steps, tokens, the last training loss and the last validation loss (nats per token).

    Raises:
        ConfigError: the ranks do not fit the parallel layout or the batch.
        InputError: too little data, or a checkpoint that lacks a parameter.
        PausedError: a stop file ended it early; it goes on from there the next time.
    """
    _check(cfg, data)
    checkpoints = out / "checkpoints"
    if not (out / "nemo").exists():
        torch.set_float32_matmul_precision(cfg.float32_matmul_precision.value)
        _configure(model.config, cfg)
        progress = Progress(cfg, out / "metrics.jsonl")
        saver = Checkpoints(cfg, checkpoints, out / "nemo")
        own: list[Callback] = [progress, saver, StopFile(out, cfg.max_steps, saver.save)]
        if start is not None:
            own.append(StartCheck(start))
        trainer = _trainer(cfg, [*own, *callbacks])
        resumed = newest_checkpoint(checkpoints)
        if validate_first and resumed is None:
            trainer.num_sanity_val_steps = math.inf
        if resumed is None and start is not None:
            trainer.strategy.restore_config = nl.RestoreConfig(path=str(start))
        log.info("training from %s", resumed or start or "random weights")
        _optimizer(cfg).connect(model)
        # Without it a checkpoint's step would be validated once more after a restart, shifting the record.
        configure_no_restart_validation_training_loop(trainer)
        resume_from = str(ckpt_to_weights_subdir(resumed, is_saving=False)) if resumed else None
        batches = nemo_api.data_module(
            model.tokenizer,
            data,
            out,
            seq_length=cfg.seq_length,
            micro_batch_size=cfg.micro_batch_size,
            global_batch_size=cfg.global_batch_size,
            num_workers=cfg.num_workers,
            seed=seed,
            signal=signal,
        )
        trainer.fit(model, batches, ckpt_path=resume_from)
        if trainer.global_step < cfg.max_steps:
            raise PausedError(f"paused at step {trainer.global_step} of {cfg.max_steps}")
    return _summary(cfg, out / "metrics.jsonl")


def _check(cfg: Training, data: DataFolder) -> None:
    """What only the ranks and the data at hand can tell."""
    parallel = cfg.parallel
    model_parallel = (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )
    if world_size() % model_parallel:
        raise ConfigError(
            f"{world_size()} ranks cannot be split into TP x PP x CP = {model_parallel}; start a multiple"
        )
    per_step = cfg.micro_batch_size * (world_size() // model_parallel)
    if cfg.global_batch_size % per_step:
        raise ConfigError(
            f"global_batch_size {cfg.global_batch_size} is no multiple of micro_batch_size x data-parallel ranks"
            f" = {per_step}; set it to a multiple"
        )
    for split, tokens in (("train", data.train_tokens), ("validation", data.validation_tokens)):
        sequences = (tokens - 1) // cfg.seq_length
        needed = cfg.global_batch_size if split == "validation" and cfg.val_batches is None else 1
        if sequences < needed:
            raise InputError(
                f"the {split} documents in {data.folder} hold {tokens} tokens, {sequences} sequences of"
                f" {cfg.seq_length}; {needed} are needed: bring more documents"
                + (", or set val_batches to a number so that they are repeated" if needed > 1 else "")
            )


def _configure(config: Any, cfg: Training) -> None:
    config.seq_length = cfg.seq_length
    if cfg.recompute is not Recompute.none:
        config.recompute_granularity = cfg.recompute.value
    if cfg.recompute is Recompute.full:
        config.recompute_method, config.recompute_num_layers = "uniform", 1


def _trainer(cfg: Training, callbacks: list[Callback]) -> nl.Trainer:
    ddp = DistributedDataParallelConfig(
        check_for_nan_in_grad=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=cfg.overlap_grad_reduce,
        overlap_param_gather=cfg.overlap_param_gather,
        average_in_collective=True,
        use_distributed_optimizer=cfg.use_distributed_optimizer,
    )
    return nemo_api.make_trainer(
        cfg.parallel,
        cfg.precision,
        ddp,
        callbacks,
        max_steps=cfg.max_steps,
        val_check_interval=min(cfg.val_every_n_steps, cfg.max_steps),
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if cfg.val_batches is None else cfg.val_batches,
        limit_test_batches=0,
        log_every_n_steps=1,
    )


def _optimizer(cfg: Training) -> MegatronOptimizerModule:
    bf16 = cfg.precision is Precision.bf16
    return MegatronOptimizerModule(
        config=OptimizerConfig(
            optimizer="adam",
            lr=cfg.lr,
            min_lr=cfg.min_lr,
            weight_decay=cfg.weight_decay,
            adam_beta1=cfg.adam_beta1,
            adam_beta2=cfg.adam_beta2,
            clip_grad=cfg.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=cfg.use_distributed_optimizer,
        ),
        lr_scheduler=CosineAnnealingScheduler(warmup_steps=cfg.warmup_steps, constant_steps=0, min_lr=cfg.min_lr),
    )


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The complete checkpoint of the highest step (`step=N` under `checkpoints`), or None."""
    complete = [folder for folder in checkpoints.glob("step=*") if folder.is_dir()]
    return max(complete, key=_step_of, default=None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("=")[2])


class Checkpoints(Callback):
    """Saves NeMo checkpoints that are either whole or not there, and the final model.

    NeMo's `ModelCheckpoint` writes under the final name with a marker file beside it, writes `-last` a second time, and
    keeps none with `save_top_k=1, save_last=False` (nemo/lightning/pytorch/callbacks/model_checkpoint.py). Here a
    checkpoint is written under a hidden name and renamed once every rank is done.

    Args:
        folder: takes `step=N`, the newest `cfg.keep_checkpoints` of them, with the optimizer's state.
        final: takes the model after the last step and its validation, weights only.
    """

    def __init__(self, cfg: Training, folder: Path, final: Path) -> None:
        self.cfg = cfg
        self.folder = folder
        self.final = final
        self.saved = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step % self.cfg.save_every_n_steps == 0 and step < self.cfg.max_steps:
            self.save(trainer)

    def save(self, trainer: Any) -> None:
        """Leaves a checkpoint of the step that has just ended, and takes away the oldest."""
        step = trainer.global_step
        # Not by looking at the disk, which two nodes may see differently.
        if step == self.saved:
            return
        self.saved = step
        _save(trainer, self.folder / f"step={step}", weights_only=False)
        if rank() == 0:
            complete = sorted(self.folder.glob("step=*"), key=_step_of)
            for old in complete[: -self.cfg.keep_checkpoints]:
                # Renamed first, so that a kill halfway leaves nothing that looks whole.
                shutil.rmtree(old.rename(old.with_name(f".removed.{old.name}")))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step >= self.cfg.max_steps:
            with getattr(pl_module, "student_only", nullcontext)():
                _save(trainer, self.final, weights_only=True)


def _save(trainer: Any, target: Path, weights_only: bool) -> None:
    partial = target.with_name(f".partial.{target.name}")
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    trainer.strategy.barrier()
    trainer.save_checkpoint(partial, weights_only)
    if rank() == 0:
        TrainerContext.from_trainer(trainer).io_dump(ckpt_to_context_subdir(partial), yaml_attrs=["model"])
    trainer.strategy.barrier()
    if rank() == 0:
        os.replace(partial, target)
    trainer.strategy.barrier()


class StartCheck(Callback):
    """Before the first step: every parameter of the student, and of the teacher, came from its checkpoint."""

    def __init__(self, start: Path) -> None:
        self.start = start

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        nemo_api.check_parameters(trainer.strategy.megatron_parallel.sharded_state_dict(), self.start)
        teacher = getattr(nemo_api.core_model(pl_module), "teacher_model", None)
        if teacher is not None:
            nemo_api.check_parameters(teacher.sharded_state_dict(prefix="module."), Path(pl_module._teacher_ckpt_path))


class Progress(Callback):
    """Writes `metrics.jsonl`: a line every `log_every_n_steps` steps and one a validation (rank 0)."""

    def __init__(self, cfg: Training, path: Path) -> None:
        self.cfg = cfg
        self.file = MetricsFile(path)
        self.since = (0, 0.0)
        self.val_losses: list[torch.Tensor] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if rank() == 0:
            self.file.forget_after(trainer.global_step)
        self.since = (trainer.global_step, time.perf_counter())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if rank() != 0 or (step % self.cfg.log_every_n_steps and step != self.cfg.max_steps):
            return
        now = time.perf_counter()
        seconds_a_step = (now - self.since[1]) / max(1, step - self.since[0])
        self.since = (step, now)
        metrics = trainer.callback_metrics
        tokens_a_step = self.cfg.global_batch_size * self.cfg.seq_length
        self.file.append(
            step=step,
            max_steps=self.cfg.max_steps,
            tokens=step * tokens_a_step,
            loss=float(metrics["reduced_train_loss"]),
            lr=trainer.optimizers[0].param_groups[0]["lr"],
            tokens_per_second=round(tokens_a_step / seconds_a_step, 1),
            seconds_left=round((self.cfg.max_steps - step) * seconds_a_step, 1),
        )

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.val_losses = []

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.val_losses.append(outputs.detach())

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        # Not the mean in `callback_metrics`: NeMo leaves the batch's size to Lightning's guess, which counts the first
        # batch once and each later one as often as it has sequences (nemo/lightning/pytorch/strategies/
        # megatron_strategy.py:918). The loss is on the last pipeline stage, 0 on the others.
        loss = torch.stack(self.val_losses).mean()
        torch.distributed.all_reduce(loss, group=parallel_state.get_pipeline_model_parallel_group())
        if rank() == 0:
            self.file.append(step=trainer.global_step, val_loss=loss.item())
        # Validation is not training time.
        self.since = (trainer.global_step, time.perf_counter())


def _summary(cfg: Training, path: Path) -> dict[str, Any]:
    lines = read_metrics(path)
    losses = [line["loss"] for line in lines if "loss" in line]
    val_losses = [line["val_loss"] for line in lines if "val_loss" in line]
    return {
        "backend": backend.activate().name,
        "steps": cfg.max_steps,
        "tokens": cfg.max_steps * cfg.global_batch_size * cfg.seq_length,
        "train_loss": losses[-1] if losses else None,
        "val_loss": val_losses[-1] if val_losses else None,
    }
