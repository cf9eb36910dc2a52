"""torchrun -m recipes.importance --config RUN_DIR/resolved.yaml

How much each layer, channel and head of the teacher matters: one pass over calibration text, which every pruning of
this teacher by this text then uses.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_distill.errors import InputError
from prune_distill.nemo.chance import require_better_than_chance
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.stage_main import rank, stage_main
from prune_distill.schema import PruneConfig, RunConfig

if TYPE_CHECKING:
    from prune_distill.data.folder import DataFolder

log = logging.getLogger("recipes.importance")


def run(cfg: RunConfig, inputs: dict[str, Any], out: Path) -> dict[str, Any]:
    """Inputs: teacher (a NeMo checkpoint), data.

    Output: `importance.safetensors`; `importance.json` and `importance.svg` for people.
    """
    from prune_distill.nemo import backend

    backend.activate()
    from prune_distill.data.folder import DataFolder
    from prune_distill.nemo import nemo_api
    from prune_distill.nemo.token_loss import average_over_tokens
    from prune_distill.pruning import evidence
    from prune_distill.pruning.search_space import measure
    from prune_distill.reporting import plots

    prune, data = cfg.prune, DataFolder.read(inputs["data"])
    nemo_api.match_tokenizer(inputs["teacher"], data)
    _enough(prune, data)
    model, trainer = nemo_api.restore(
        inputs["teacher"],
        pipeline_model_parallel_size=prune.pipeline_model_parallel_size,
        modelopt_spec=True,
        max_steps=prune.calibration_samples,
        limit_val_batches=prune.calibration_samples,
        val_check_interval=prune.calibration_samples,
    )
    average_over_tokens(model)
    text = _calibration_data(model, prune, data, cfg.seed, out)
    # As nemo's prune_language_model does, whose own forward loop also opens a log folder in the working directory.
    scores = measure(model, lambda: trainer.validate(model, text, verbose=False))
    loss = _plausible(model, data)
    if rank() == 0:
        scores.save(out)
        table = evidence.importance_table(scores, model.config)
        write_json(out / "importance.json", table)
        plots.importance(table).save(out / "importance.svg")
    trainer.strategy.barrier()
    return {"calibration_loss": loss, "layers": {str(layer): score for layer, score in scores.layers.items()}}


def _enough(prune: PruneConfig, data: Any) -> None:
    there_are = (data.train_tokens - 1) // prune.calibration_seq_length
    if there_are < prune.calibration_samples:
        log.warning(
            "the training documents hold %d sequences of %d tokens, fewer than prune.calibration_samples=%d: text is "
            "repeated, which adds nothing; bring more documents, or set it lower",
            there_are,
            prune.calibration_seq_length,
            prune.calibration_samples,
        )


def _calibration_data(model: Any, prune: PruneConfig, data: Any, seed: int, out: Path) -> Any:
    """Training documents, through the validation loop that the forward passes use.

    One sequence at a time: ModelOpt's scores of layers and experts are sums of means over a batch, so that they would
    depend on its size (modelopt/torch/nas/plugins/megatron.py:289 and :893).
    """
    from prune_distill.nemo.nemo_api import data_module

    batches = data_module(
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


def _plausible(model: Any, data: DataFolder) -> float:
    """The teacher's loss on the calibration text, nats per learned token.

    Raises:
        InputError: no token is learned; or the teacher knows no more than chance. Its weights or its tokenizer are not
            what they should be, and distilling from it would teach nothing.
    """
    loss: float = model.validation_loss_reduction.mean("the calibration text (prune.calibration_samples)")
    if not math.isfinite(loss):
        raise InputError(
            f"the teacher's loss on the calibration text is {loss}: its logits are not finite; check that the output"
            " layer's weights in model.hf_path are finite"
        )
    require_better_than_chance(
        loss,
        data.vocab_size,
        "the calibration text",
        "check that model.hf_path holds trained weights and their own tokenizer",
    )
    return loss


if __name__ == "__main__":
    stage_main(run, "importance")
