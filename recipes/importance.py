"""torchrun -m recipes importance --config RUN_DIR/resolved.yaml

Compute importance scores of the teacher's layers, channels and heads with one pass over calibration text. Every pruning
of this teacher with this text uses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_distill.data.folder import DataFolder
from prune_distill.nemo import nemo_api
from prune_distill.nemo.datasets import make_data_module
from prune_distill.nemo.token_loss import average_over_tokens
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.names import IMPORTANCE
from prune_distill.pipeline.run_arguments import Metrics
from prune_distill.pipeline.stage_main import rank
from prune_distill.pruning import evidence
from prune_distill.pruning.importance import check_loss, warn_if_few_sequences
from prune_distill.pruning.search_space import measure
from prune_distill.reporting import plots
from prune_distill.schema import PruneConfig, RunConfig


@dataclass(frozen=True)
class Inputs:
    """The model to prune as a NeMo checkpoint, and prepared data."""

    teacher: Path
    data: Path


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Output: `importance.safetensors`; `importance.json` and `importance.svg` for people."""
    prune, data = cfg.prune, DataFolder.read(inputs.data)
    nemo_api.match_tokenizer(inputs.teacher, data)
    warn_if_few_sequences(prune, data.train_tokens)
    model, trainer = nemo_api.restore(
        inputs.teacher,
        pipeline_model_parallel_size=prune.pipeline_model_parallel_size,
        modelopt_spec=True,
        max_steps=prune.calibration_samples,
        limit_val_batches=prune.calibration_samples,
        val_check_interval=prune.calibration_samples,
    )
    average_over_tokens(model)
    text = _calibration_data(model, prune, data, cfg.seed, out)
    # As in NeMo's prune_language_model, whose own forward loop also creates a log folder in the working directory.
    scores = measure(model, lambda: trainer.validate(model, text, verbose=False))
    loss = model.validation_loss_reduction.mean("the calibration text (prune.calibration_samples)")
    check_loss(loss, data.vocab_size)
    if rank() == 0:
        scores.save(out)
        table = evidence.importance_table(scores, model.config)
        write_json(out / IMPORTANCE, table)
        plots.importance(table).save(out / "importance.svg")
    trainer.strategy.barrier()
    return {"calibration_loss": loss, "layers": {str(layer): score for layer, score in scores.layers.items()}}


def _calibration_data(model: Any, prune: PruneConfig, data: Any, seed: int, out: Path) -> Any:
    """Return training documents as validation data, because the forward passes use the validation loop.

    The batch size is one: ModelOpt's scores of layers and experts are sums of means over a batch, so they would
    depend on its size (modelopt/torch/nas/plugins/megatron.py:289 and :893).
    """
    batches = make_data_module(
        model.tokenizer,
        data,
        out,
        seq_length=prune.calibration_seq_length,
        micro_batch_size=1,
        global_batch_size=1,
        num_workers=0,
        seed=seed,
    )
    batches.val_dataloader = batches.train_dataloader
    return batches
