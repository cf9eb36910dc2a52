"""The optimizer of a training, and how its learning rate and weight decay are set."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from nemo.lightning.pytorch.optim import LRSchedulerModule, MegatronOptimizerModule
from torch.optim.lr_scheduler import LambdaLR

from prune_distill.schema import Precision, Training
from prune_distill.training.schedules import learning_rate


def connect_optimizer(model: Any, cfg: Training) -> None:
    """Gives a NeMo model its optimizer: Adam by Megatron, with the training's learning rates."""
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
    # After it: a checkpoint's context records what is connected, and NeMo reads no classes but its own back.
    optimizer.lr_scheduler = Rates(cfg)
    if not cfg.decay_embeddings:
        optimizer.no_weight_decay_cond = _no_decay


def _no_decay(name: str, parameter: torch.Tensor) -> bool:
    """Megatron's own choice, norms and biases (megatron/core/optimizer/__init__.py:112), and the embedding.

    Its copy on the last pipeline stage, where it is tied, is marked `shared_embedding`.
    """
    embedding = "embedding" in name or getattr(parameter, "shared_embedding", False)
    return embedding or name.endswith(".bias") or parameter.dim() == 1


class Rates(LRSchedulerModule):
    """`learning_rate` as NeMo's optimizer module takes it."""

    def __init__(self, cfg: Training) -> None:
        super().__init__()
        self.cfg = cfg

    def scheduler(self, model: Any, optimizer: Any) -> dict[str, Any]:
        """As Lightning's `configure_optimizers` returns it: a change after every step."""
        cfg = self.cfg
        rates = LambdaLR(optimizer, lambda step: learning_rate(cfg, step) / cfg.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step", "frequency": 1}}
