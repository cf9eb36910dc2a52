"""Speed and memory of the exported models."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from prune_distill.schema.convert import ExportDtype
from prune_distill.schema.fields import placement


class Engine(Enum):
    """What runs the models in a benchmark."""

    transformers = "transformers"
    vllm = "vllm"


@dataclass
class BenchmarkConfig:
    """How fast teacher and student are beside each other, with how much memory."""

    enabled: bool = placement(False)
    engine: Engine = Engine.transformers
    # The type in which the models compute; keep: that of their weights.
    dtype: ExportDtype = ExportDtype.keep
    batch_size: int = 1
    prompt_tokens: int = 512
    new_tokens: int = 128
    # Each model once per round, interleaved; a first round is not counted.
    rounds: int = 5
    # Threads of a CPU; null: as many as PyTorch takes.
    threads: int | None = None
    # Price of the machine that is measured, in any currency; null: the report shows no costs.
    cost_per_hour: float | None = placement(None)
