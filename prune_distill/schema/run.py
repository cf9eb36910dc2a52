"""A whole run: one section per config group."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from prune_distill.schema.benchmark import BenchmarkConfig
from prune_distill.schema.cluster import ClusterConfig
from prune_distill.schema.convert import ConvertConfig
from prune_distill.schema.data import DataConfig
from prune_distill.schema.distill import DistillConfig
from prune_distill.schema.evaluate import EvaluateConfig
from prune_distill.schema.fields import placement
from prune_distill.schema.model import ModelConfig
from prune_distill.schema.prune import PruneConfig


@dataclass
class RunConfig:
    """A whole run. `name` is what the report calls it; `run_dir` holds everything that it writes."""

    name: str = MISSING
    run_dir: str = MISSING
    seed: int = 1234
    # Whether a stage reads its inputs once before it starts, and compares them with what was written; false: only
    # their sizes.
    verify_inputs: bool = placement(True)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
