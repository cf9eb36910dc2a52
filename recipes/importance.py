"""torchrun -m recipes.importance --config RUN_DIR/resolved.yaml

How much each layer, channel and head of the teacher matters: one pass over calibration text, which every pruning of
this teacher by this text then uses.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from conf.errors import InputError
from conf.schema import PruneConfig, RunConfig
from recipes.artifact import write_json
from recipes.runtime.stage_main import rank, stage_main

log = logging.getLogger("recipes.importance")


def run(cfg: RunConfig, inputs: dict[str, Any], out: Path) -> dict[str, Any]:
    """Inputs: teacher (a NeMo checkpoint), data.

    Output: `importance.safetensors`; `importance.json` and `importance.svg` for people.
    """
    from recipes.runtime import backend

    backend.activate()
    from recipes.runtime import nemo_api, plots
    from recipes.runtime.data.folder import DataFolder
    from recipes.runtime.pruning import evidence
    from recipes.runtime.pruning.search_space import measure

    prune, data = cfg.prune, DataFolder.read(inputs["data"])
    nemo_api.match_tokenizer(inputs["teacher"], data)
    _enough(prune, data)
    batches = math.ceil(prune.calibration_samples / prune.micro_batch_size)
    model, trainer = nemo_api.restore(
        inputs["teacher"],
        pipeline_model_parallel_size=prune.pipeline_model_parallel_size,
        modelopt_spec=True,
        max_steps=batches,
        limit_val_batches=batches,
        val_check_interval=batches,
    )
    text = _calibration_data(model, prune, data, cfg.seed, out)
    # As nemo's prune_language_model does, whose own forward loop also opens a log folder in the working directory.
    scores = measure(model, lambda: trainer.validate(model, text, verbose=False))
    loss = _plausible(trainer, model.config.vocab_size)
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
    """Batches of training documents, through the validation loop that the forward passes use."""
    from recipes.runtime.nemo_api import data_module

    batches = data_module(
        model.tokenizer,
        data,
        out,
        seq_length=prune.calibration_seq_length,
        micro_batch_size=prune.micro_batch_size,
        global_batch_size=prune.micro_batch_size,
        num_workers=0,
        seed=seed,
    )
    batches.val_dataloader = batches.train_dataloader
    return batches


def _plausible(trainer: Any, vocab_size: int) -> float:
    """The teacher's loss on the calibration text, nats per token.

    Raises:
        InputError: it knows no more than chance. Its weights or its tokenizer are not what they should be, and
            distilling from it would teach nothing.
    """
    loss = float(trainer.callback_metrics["val_loss"])
    if not loss < math.log(vocab_size):
        raise InputError(
            f"the teacher's loss on the calibration text is {loss:.3f} nats per token, no better than chance"
            f" ({math.log(vocab_size):.3f}); check that model.hf_path holds trained weights and their own tokenizer"
        )
    return loss


if __name__ == "__main__":
    stage_main(run, "importance")
