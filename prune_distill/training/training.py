"""Train a model with NeMo: the demo's teacher, the student and its controls.

Training resumes from the newest undamaged checkpoint in `OUT/checkpoints`, appends to `OUT/metrics.jsonl`, and writes
the final model to `OUT/nemo`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from megatron.core.distributed import DistributedDataParallelConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.lightning.io.pl import ckpt_to_weights_subdir
from nemo.lightning.pytorch.trainer import configure_no_restart_validation_training_loop

from prune_distill.data.folder import DataFolder
from prune_distill.distillation.cached_logits_batch import TeacherCaches
from prune_distill.errors import ConfigError, InputError
from prune_distill.model.flops import Meter
from prune_distill.nemo import backend, nemo_api
from prune_distill.nemo.precision import require_fp8
from prune_distill.nemo.start_check import StartCheck, check_resumed
from prune_distill.nemo.token_loss import average_over_tokens
from prune_distill.pipeline.metrics_file import read_metrics
from prune_distill.pipeline.names import CHECKPOINTS, METRICS, NEMO
from prune_distill.pipeline.stage_main import PausedError, world_size
from prune_distill.schema import DistillConfig, Recompute, Training
from prune_distill.schema.phases import spare_batches, training_phases, training_tokens
from prune_distill.training.batches import Batches, UsePhase
from prune_distill.training.checkpoints import Checkpoints, resume_point
from prune_distill.training.loss_guard import GRADIENTS, LossGuard
from prune_distill.training.metrics import MetricsWriter
from prune_distill.training.optimizer import connect_optimizer
from prune_distill.training.stop_file import StopFile

log = logging.getLogger("recipes.training")


def train(
    model: llm.GPTModel,
    cfg: Training,
    data: DataFolder,
    out: Path,
    *,
    seed: int,
    start: Path | None,
    key: str = "distill",
    meter: Meter | None = None,
    cached_logits: TeacherCaches | None = None,
    validate_first: bool = False,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Train a model for `cfg.max_steps` optimizer steps and write it to `out/nemo`.

    Args:
        model: an unconfigured NeMo model with its tokenizer.
        data: prepared training and validation documents.
        start: NeMo checkpoint with the initial weights; None: random weights.
        key: the config key of `cfg`, for messages.
        meter: computes the utilization of the GPU, if it is known.
        cached_logits: cached logits of the training sequences, for a model whose `data_step` reads them.
        validate_first: whether to compute the validation loss before the first step.
        callbacks: more Lightning callbacks.

    Returns:
        Backend, steps, tokens, steps whose batch was skipped, the last training loss, the last and the best validation
        loss (nats per token).

    Raises:
        ConfigError: the ranks do not fit the parallel layout or the batch; the GPU has no FP8.
        InputError: too little data; a checkpoint lacks a parameter or belongs to another model; all checkpoints are
            damaged; a loss is non-finite or much too high.
        PausedError: training stopped early because of a stop file; the next run resumes.
    """
    check(cfg, data)
    teacher_fp8 = cfg.fp8_of_teacher if isinstance(cfg, DistillConfig) and cfg.runs_teacher else None
    require_fp8({f"{key}.fp8": cfg.fp8, "distill.teacher_fp8": teacher_fp8})
    if not (out / NEMO).exists():
        torch.set_float32_matmul_precision(cfg.float32_matmul_precision.value)
        _configure(model.config, cfg)
        resumed = resume_point(out / CHECKPOINTS)
        if resumed is not None:
            check_resumed(model.config, resumed)
        batches = Batches(model.tokenizer, data, out, cfg, seed, cached_logits)
        guard = LossGuard(cfg, batches, out, key)
        saver = Checkpoints(cfg, out / CHECKPOINTS, out / NEMO, out / METRICS)
        # The order matters: a bad loss is neither recorded nor saved, and a pause comes after its checkpoint.
        standard: list[Callback] = [UsePhase(batches), guard, MetricsWriter(cfg, out, meter), saver]
        standard += [StopFile(out, cfg.max_steps, saver.save), StartCheck(start)]
        trainer = _trainer(cfg, [*standard, *callbacks])
        if validate_first and resumed is None:
            trainer.num_sanity_val_steps = math.inf
        if resumed is None and start is not None:
            trainer.strategy.restore_config = nl.RestoreConfig(path=str(start))
        log.info("training from %s", resumed or start or "random weights")
        average_over_tokens(model)
        connect_optimizer(model, cfg)
        # Otherwise the step of a checkpoint is validated again after a restart.
        configure_no_restart_validation_training_loop(trainer)
        _fit(trainer, model, batches, resumed, guard)
        if trainer.global_step < cfg.max_steps:
            raise PausedError(f"paused at step {trainer.global_step} of {cfg.max_steps}")
    return _summary(cfg, out / METRICS)


def _fit(trainer: nl.Trainer, model: llm.GPTModel, batches: Batches, resumed: Path | None, guard: LossGuard) -> None:
    resume_from = str(ckpt_to_weights_subdir(resumed, is_saving=False)) if resumed else None
    try:
        trainer.fit(model, batches, ckpt_path=resume_from)
    except RuntimeError as fault:
        if GRADIENTS not in str(fault):
            raise
        raise guard.error(trainer.global_step, f"non-finite gradients ({fault})") from None


def check(cfg: Training, data: DataFolder) -> None:
    """Check the config against the ranks and the data. Raises: ConfigError, InputError; see `train`."""
    parallel = cfg.parallel
    model_parallel = (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )
    if world_size() % model_parallel:
        raise ConfigError(
            f"{world_size()} ranks are not a multiple of TP x PP x CP = {model_parallel}; start a multiple"
        )
    sizes: Any
    for sizes in (cfg, *training_phases(cfg)):
        per_step = sizes.micro_batch_size * (world_size() // model_parallel)
        if sizes.global_batch_size % per_step:
            raise ConfigError(
                f"global_batch_size={sizes.global_batch_size}: not a multiple of micro_batch_size x data-parallel "
                "ranks ="
                f" {per_step}; set it to a multiple"
            )
    for phase in training_phases(cfg):
        parts = data if phase.weights is None else data.weighted(phase.weights)
        _check_size("train", data.folder, parts.train_tokens, phase.seq_length, 1)
    needed = cfg.global_batch_size if cfg.val_batches is None else 1
    _check_size("validation", data.folder, data.validation_tokens, cfg.seq_length, needed)


def _check_size(split: str, folder: Path, tokens: int, seq_length: int, needed: int) -> None:
    sequences = (tokens - 1) // seq_length
    if sequences < needed:
        raise InputError(
            f"the {split} documents in {folder} contain {tokens} tokens, {sequences} sequences of {seq_length}, but"
            f" {needed} are needed; add documents"
            + (", or set val_batches to a number so that they are repeated" if needed > 1 else "")
        )


def _configure(config: Any, cfg: Training) -> None:
    config.seq_length = cfg.seq_length
    if config.num_moe_experts:
        # Gradients are averaged over context-parallel ranks, so the loss is multiplied by their number. The router's
        # auxiliary loss, of which each rank has a part, is not (megatron/core/pipeline_parallel/schedules.py:247
        # and :271).
        config.moe_aux_loss_coeff *= cfg.parallel.context_parallel_size
        if config.moe_router_load_balancing_type == "aux_loss":
            # Per sequence: the loss of a micro batch depends on its number of sequences. With one sequence both are
            # equal (megatron/core/transformer/moe/router.py:277 and :309).
            config.moe_router_load_balancing_type = "seq_aux_loss"
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
        {"ckpt_async_save": cfg.async_save},
        cfg.fp8,
        max_steps=cfg.max_steps,
        val_check_interval=min(cfg.val_every_n_steps, cfg.max_steps),
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if cfg.val_batches is None else cfg.val_batches,
        limit_test_batches=0,
        log_every_n_steps=1,
    )


def _summary(cfg: Training, path: Path) -> dict[str, Any]:
    lines = read_metrics(path)
    losses = [line["loss"] for line in lines if "loss" in line]
    val_losses = [line["val_loss"] for line in lines if "val_loss" in line]
    return {
        "backend": backend.activate().name,
        "steps": cfg.max_steps,
        "tokens": training_tokens(cfg),
        "skipped_steps": sorted(step + 1 for step in spare_batches(cfg)),
        "train_loss": losses[-1] if losses else None,
        "val_loss": val_losses[-1] if val_losses else None,
        "best_val_loss": min(val_losses, default=None),
    }
