"""Where a training's figures go besides `metrics.jsonl`: TensorBoard always, Weights & Biases and MLflow if asked for.

Rank 0 only. No credentials are taken from the config or written to a file: both services read their own environment
variables.
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
    """The services that a training's config names.

    Args:
        out: the stage's folder; takes `tensorboard/`, and what the others keep locally.
        step: the step that training goes on from; TensorBoard forgets what a killed process wrote beyond it.
    """

    def __init__(self, cfg: Training, out: Path, step: int) -> None:
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self.writers: list[tuple[Write, Callable[[], None]]] = [(self._board, self.board.close)]
        if cfg.wandb is not None:
            self.writers.append(_wandb(cfg.wandb, out))
        if cfg.mlflow is not None:
            self.writers.append(_mlflow(cfg.mlflow, out))

    def write(self, values: dict[str, float], step: int) -> None:
        """Figures by name, all of one step."""
        for write, _ in self.writers:
            try:
                write(values, step)
            except Exception:  # a service that is down is no reason to end a training
                log.warning("figures of step %d were not written", step, exc_info=True)

    def close(self) -> None:
        for _, close in self.writers:
            close()

    def _board(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()


def _wandb(cfg: WeightsAndBiases, out: Path) -> tuple[Write, Callable[[], None]]:
    import wandb  # optional

    # An id of the folder's own: a resumed training goes on with the same curves.
    name = f"{out.parent.name}-{out.name}"
    run = wandb.init(project=cfg.project, entity=cfg.entity, id=name, name=name, resume="allow", dir=str(out))

    def write(values: dict[str, float], step: int) -> None:
        run.log(values, step=step)

    return write, run.finish


def _mlflow(cfg: Mlflow, out: Path) -> tuple[Write, Callable[[], None]]:
    import mlflow  # optional

    mlflow.set_tracking_uri(cfg.tracking_uri)
    mlflow.set_experiment(cfg.experiment)
    noted = out / "mlflow.json"
    known = json.loads(noted.read_text())["run_id"] if noted.exists() else None
    run: Any = mlflow.start_run(run_id=known, run_name=None if known else f"{out.parent.name}-{out.name}")
    write_json(noted, {"run_id": run.info.run_id})

    def write(values: dict[str, float], step: int) -> None:
        mlflow.log_metrics(values, step=step)

    return write, mlflow.end_run
