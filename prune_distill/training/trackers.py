"""Metrics for TensorBoard, and for Weights & Biases and MLflow if they are configured.

Rank 0 only. Credentials come from the services' environment variables, never from the config, and are not written to
files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from prune_distill.pipeline.artifact import write_json
from prune_distill.schema import Mlflow, Training, WeightsAndBiases

log = logging.getLogger("recipes.trackers")

Write = Callable[[dict[str, float], int], None]


class Trackers:
    """The trackers of a training run.

    Args:
        out: the stage's folder, for `tensorboard/` and the local files of the services.
        step: the step from which training starts; TensorBoard drops what a killed process wrote after it.
    """

    def __init__(self, cfg: Training, out: Path, step: int) -> None:
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self.writers: list[tuple[Write, Callable[[], None]]] = [(self._board, self.board.close)]
        if cfg.wandb is not None:
            self.writers.append(_wandb(cfg.wandb, out))
        if cfg.mlflow is not None:
            self.writers.append(_mlflow(cfg.mlflow, out))

    def write(self, values: dict[str, float], step: int) -> None:
        """Write the metrics of a step, by name."""
        for write, _ in self.writers:
            try:
                write(values, step)
            except Exception:  # training continues when a service is down
                log.warning("the metrics of step %d were not written", step, exc_info=True)

    def close(self) -> None:
        for _, close in self.writers:
            close()

    def _board(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()


def _wandb(cfg: WeightsAndBiases, out: Path) -> tuple[Write, Callable[[], None]]:
    import wandb  # optional

    # The id is derived from the folder, so that a resumed run continues the same curves.
    name = f"{out.parent.name}-{out.name}"
    run = wandb.init(project=cfg.project, entity=cfg.entity, id=name, name=name, resume="allow", dir=str(out))

    def write(values: dict[str, float], step: int) -> None:
        run.log(values, step=step)

    return write, run.finish


def _mlflow(cfg: Mlflow, out: Path) -> tuple[Write, Callable[[], None]]:
    import mlflow  # optional

    mlflow.set_tracking_uri(cfg.tracking_uri)
    mlflow.set_experiment(cfg.experiment)
    saved = out / "mlflow.json"
    known = json.loads(saved.read_text())["run_id"] if saved.exists() else None
    run: Any = mlflow.start_run(run_id=known, run_name=None if known else f"{out.parent.name}-{out.name}")
    write_json(saved, {"run_id": run.info.run_id})

    def write(values: dict[str, float], step: int) -> None:
        mlflow.log_metrics(values, step=step)

    return write, mlflow.end_run
