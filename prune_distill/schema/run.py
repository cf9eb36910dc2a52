"""A whole run: one section per config group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from prune_distill.schema.benchmark import BenchmarkConfig
from prune_distill.schema.cluster import ClusterConfig
from prune_distill.schema.convert import ConvertConfig
from prune_distill.schema.data import DataConfig
from prune_distill.schema.distill import DistillConfig
from prune_distill.schema.evaluate import EvaluateConfig
from prune_distill.schema.families import Family
from prune_distill.schema.fields import NonNegativeInt, Range, Text, placement
from prune_distill.schema.model import ModelConfig, Shape, TeacherConfig
from prune_distill.schema.prune import PruneConfig
from prune_distill.schema.quantize import QuantizeConfig

# The settings of a training that its layout consists of.
LAYOUT = (
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.context_parallel_size",
    "parallel.expert_model_parallel_size",
    "micro_batch_size",
    "recompute",
)
# Most teachers of single sources that the stage table has stages for.
MOST_SOURCE_TEACHERS = 4
# The keys that may be `auto`.
AUTOMATIC = (
    *(f"distill.{key}" for key in LAYOUT),
    *(f"distill.teacher_correction.{key}" for key in LAYOUT),
    "distill.kd.chunk_tokens",
    "prune.pipeline_model_parallel_size",
    "prune.micro_batch_size",
    "teacher.parallel.tensor_model_parallel_size",
    "teacher.parallel.pipeline_model_parallel_size",
    "teacher.micro_batch_size",
)


@dataclass
class RunConfig:
    """A whole run."""

    # Name of the run in reports and model cards.
    name: Text = MISSING
    # Folder for everything that the run writes.
    run_dir: Text = placement(MISSING)
    # Seed of all random choices. The limit is NumPy's.
    seed: Annotated[NonNegativeInt, Range(at_most=2**32 - 1)] = 1234
    # Whether a stage compares the content of its inputs with what their stages wrote, before it starts; false: only
    # their sizes.
    verify_inputs: bool = placement(True)
    # Keys that were `auto`, for which launch.run chose values; it sets this itself.
    automatic: list[str] = placement(list)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    cluster: ClusterConfig = placement(ClusterConfig)

    @property
    def has_own_teacher(self) -> bool:
        """Whether the teacher is another model than the one that is pruned."""
        return self.teacher.hf_path is not None

    @property
    def source_teachers(self) -> list[TeacherConfig]:
        """The teachers that only some sources of the data have, in the order of the sources. Equal ones are one."""
        # A config that is being checked may have unreadable sources.
        named = [getattr(source, "teacher", None) for source in (self.data.sources or {}).values()]
        return [
            teacher
            for number, teacher in enumerate(named)
            if teacher not in (None, self.teacher) and teacher not in named[:number]
        ]

    @property
    def teacher_numbers(self) -> dict[str, int]:
        """The number of each source's teacher in `source_teachers`, counted from 1; 0: the teacher of the run."""
        teachers = [self.teacher, *self.source_teachers]
        return {
            name: teachers.index(source.teacher or self.teacher) for name, source in (self.data.sources or {}).items()
        }

    @property
    def cached_sources(self) -> list[str] | None:
        """The sources whose sequences a stage cache_logits caches; None: all. In the config of that stage, `teacher` is
        the teacher that it runs, and all sources have theirs (`prune_distill.config.values.cache_stage_settings`)."""
        named = self.data.sources or {}
        if all(source.teacher is None for source in named.values()):
            return None
        return [name for name, source in named.items() if source.teacher == self.teacher]

    @property
    def shared_vocabulary(self) -> int:
        """The number of ids that the student and all teachers have, the first of each vocabulary."""
        named = [getattr(source, "teacher", None) for source in (self.data.sources or {}).values()]
        shapes = [self.model.shape, *((teacher or self.teacher).shape for teacher in named or [None])]
        return min(shape.vocab_size for shape in shapes if shape is not None)

    @property
    def original_name(self) -> str:
        """What messages and reports call the model that is pruned."""
        return "original" if self.has_own_teacher else "teacher"

    @property
    def teacher_shape(self) -> Shape | None:
        """The shape of the teacher of the distillation."""
        return self.teacher.shape if self.has_own_teacher else self.model.shape

    @property
    def teacher_family(self) -> Family:
        """The family of the teacher of the distillation."""
        return self.teacher.family or self.model.family
