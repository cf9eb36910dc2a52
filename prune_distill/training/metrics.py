"""Training metrics: `metrics.jsonl`, and the trackers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from prune_distill.model.flops import Meter
from prune_distill.pipeline.metrics_file import MetricsFile
from prune_distill.pipeline.names import METRICS
from prune_distill.pipeline.stage_main import rank
from prune_distill.schema import Training
from prune_distill.schema.phases import phase_number, tokens_before, training_phases
from prune_distill.training.trackers import Trackers


class MetricsWriter(Callback):
    """Writes `metrics.jsonl`: a line every `log_every_n_steps` steps, and one per validation (rank 0).

    The line of a step contains the loss, its parts if the model has `loss_parts()`, the learning rate, the total
    tokens, and the tokens per second.

    Args:
        meter: computes the model-FLOPs utilization (`mfu`); None: no `mfu`.
    """

    def __init__(self, cfg: Training, out: Path, meter: Meter | None) -> None:
        self.cfg, self.out, self.meter = cfg, out, meter
        self.phases = training_phases(cfg)
        self.file = MetricsFile(out / METRICS)
        self.last_log = (0, 0.0)
        self.trackers: Trackers | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if rank() == 0:
            self.file.truncate_after(trainer.global_step)
            self.trackers = Trackers(self.cfg, self.out, trainer.global_step)
        self.last_log = (trainer.global_step, time.perf_counter())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step % self.cfg.log_every_n_steps and step != self.cfg.max_steps:
            return
        # All ranks call it: the last pipeline stage broadcasts the parts.
        parts = pl_module.loss_parts() if hasattr(pl_module, "loss_parts") else {}
        if rank() != 0:
            return
        now = time.perf_counter()
        tokens = tokens_before(self.phases, step)
        tokens_per_second = (tokens - tokens_before(self.phases, self.last_log[0])) / (now - self.last_log[1])
        self.last_log = (step, now)
        tokens_left = tokens_before(self.phases, self.cfg.max_steps) - tokens
        self._write(
            step,
            max_steps=self.cfg.max_steps,
            tokens=tokens,
            loss=float(trainer.callback_metrics["reduced_train_loss"]),
            **parts,
            # The scheduler has already advanced to the next step.
            lr=trainer.optimizers[0].param_groups[0]["lr"],
            tokens_per_second=round(tokens_per_second, 1),
            **self._utilization(step, tokens_per_second),
            seconds_left=round(tokens_left / tokens_per_second, 1),
        )

    def _utilization(self, step: int, tokens_per_second: float) -> dict[str, float]:
        if self.meter is None:
            return {}
        seq_length = self.phases[phase_number(self.phases, step - 1)].seq_length
        return {"mfu": round(self.meter.utilization(tokens_per_second, seq_length), 4)}

    def _write(self, step: int, **values: float) -> None:
        self.file.append(step=step, **values)
        if self.trackers is not None:
            self.trackers.write(values, step)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.validation_loss_reduction.reset()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        # Not the mean in `callback_metrics`: Lightning guesses the batch size, so that the first batch counts once and
        # each later batch counts once per sequence (nemo/lightning/pytorch/strategies/
        # megatron_strategy.py:918).
        loss = pl_module.validation_loss_reduction.mean("the validation batches (val_batches)")
        if rank() == 0:
            self._write(trainer.global_step, val_loss=loss)
        # Exclude validation from the training speed.
        self.last_log = (trainer.global_step, time.perf_counter())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.trackers is not None:
            self.trackers.close()
