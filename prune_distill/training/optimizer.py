"""The optimizer, its learning rates and weight decay."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from nemo.lightning.pytorch.optim import LRSchedulerModule, MegatronOptimizerModule
from torch.optim.lr_scheduler import LambdaLR

from prune_distill.schema import Precision, Training
from prune_distill.schema.schedules import learning_rate


def connect_optimizer(model: Any, cfg: Training) -> None:
    """Connect a NeMo model to Megatron's Adam with the learning rates of the config."""
    bf16 = cfg.precision is Precision.bf16
    optimizer = MegatronOptimizerModule(
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
        )
    )
    optimizer.connect(model)
    # Set after `connect`: a checkpoint's context records what is connected, and NeMo only loads its own classes.
    optimizer.lr_scheduler = LearningRates(cfg)
    if not cfg.decay_embeddings:
        optimizer.no_weight_decay_cond = _no_decay


def _no_decay(name: str, parameter: torch.Tensor) -> bool:
    """Exclude norms and biases, as Megatron does (megatron/core/optimizer/__init__.py:112), and the embedding.

    The copy of a tied embedding on the last pipeline stage is marked `shared_embedding`.
    """
    embedding = "embedding" in name or getattr(parameter, "shared_embedding", False)
    return embedding or name.endswith(".bias") or parameter.dim() == 1


class LearningRates(LRSchedulerModule):
    """Adapter of `learning_rate` for NeMo's optimizer module."""

    def __init__(self, cfg: Training) -> None:
        super().__init__()
        self.cfg = cfg

    def scheduler(self, model: Any, optimizer: Any) -> dict[str, Any]:
        """Return the scheduler in the format of Lightning's `configure_optimizers`, with one update per step."""
        cfg = self.cfg
        rates = LambdaLR(optimizer, lambda step: learning_rate(cfg, step) / cfg.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step", "frequency": 1}}
