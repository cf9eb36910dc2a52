"""Typed configuration of a run: one dataclass per config group, `RunConfig` at the root.

The values are in the YAML files in `conf/`; `prune_distill.config.load` merges them into these classes, so that an
unknown key or a wrong type is refused. Paths may be relative to the working directory. Each field has its bounds in its
type and its description in the comment above it (see `prune_distill.schema.fields`).

Each field is also marked with what it means for the hash that identifies a stage's result: `placement()`,
`recorded()`, `hashed_elsewhere()`, `hashed_if()`, or none of them where it decides the result (see
`prune_distill.schema.fields.Identity`). A run can resume on another layout because its layout is not in the hash.
"""

from prune_distill.schema.benchmark import BenchmarkConfig, Engine
from prune_distill.schema.cluster import ClusterConfig, Gpu, GpuRequest, NumaBinding, SlurmConfig
from prune_distill.schema.convert import ConvertConfig, ExportDtype
from prune_distill.schema.data import DataConfig, DataSource, DocumentFormat, Learn, LongDocuments
from prune_distill.schema.distill import (
    DistillConfig,
    Divergence,
    HiddenLoss,
    Init,
    KdConfig,
    LayerPair,
    Loss,
    LossImplementation,
    TeacherLogits,
)
from prune_distill.schema.evaluate import Continuations, EvaluateConfig
from prune_distill.schema.families import Family
from prune_distill.schema.model import DemoModel, ModelConfig, Shape, TeacherConfig
from prune_distill.schema.on_policy import MOST_ON_POLICY_ROUNDS, GenerationEngine, OnPolicy
from prune_distill.schema.prune import (
    Budget,
    LayerSelection,
    PruneConfig,
    PruneRound,
    SuccessiveHalving,
    TargetSizes,
    TaskScore,
)
from prune_distill.schema.quantize import QuantFormat, QuantizeConfig
from prune_distill.schema.run import MOST_SOURCE_TEACHERS, RunConfig
from prune_distill.schema.training import (
    Fp8,
    MatmulPrecision,
    Mlflow,
    Packing,
    Parallel,
    Phase,
    Precision,
    Recompute,
    Schedule,
    Training,
    WeightsAndBiases,
)

__all__ = [
    "MOST_ON_POLICY_ROUNDS",
    "MOST_SOURCE_TEACHERS",
    "BenchmarkConfig",
    "Budget",
    "ClusterConfig",
    "Continuations",
    "ConvertConfig",
    "DataConfig",
    "DataSource",
    "DemoModel",
    "DistillConfig",
    "Divergence",
    "DocumentFormat",
    "Engine",
    "EvaluateConfig",
    "ExportDtype",
    "Family",
    "Fp8",
    "GenerationEngine",
    "Gpu",
    "GpuRequest",
    "HiddenLoss",
    "Init",
    "KdConfig",
    "LayerPair",
    "LayerSelection",
    "Learn",
    "LongDocuments",
    "Loss",
    "LossImplementation",
    "MatmulPrecision",
    "Mlflow",
    "ModelConfig",
    "NumaBinding",
    "OnPolicy",
    "Packing",
    "Parallel",
    "Phase",
    "Precision",
    "PruneConfig",
    "PruneRound",
    "QuantFormat",
    "QuantizeConfig",
    "Recompute",
    "RunConfig",
    "Schedule",
    "Shape",
    "SlurmConfig",
    "SuccessiveHalving",
    "TargetSizes",
    "TaskScore",
    "TeacherConfig",
    "TeacherLogits",
    "Training",
    "WeightsAndBiases",
]
