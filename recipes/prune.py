"""torchrun -m recipes.prune --config RUN_DIR/resolved.yaml

Minitron pruning with ModelOpt: activations over calibration text rank channels, heads and layers, and the least
important ones are cut from the teacher.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from conf.errors import InputError
from conf.schema import PruneConfig, RunConfig
from recipes.runtime.stage_main import rank, stage_main


def run(cfg: RunConfig, inputs: dict[str, Any], out: Path) -> dict[str, Any]:
    """Inputs: teacher (a NeMo checkpoint), data. Output: `nemo/`, the student before distillation."""
    from recipes.runtime import backend

    backend.activate()
    import modelopt.torch.prune as mtp
    from nemo.collections.llm.modelopt.prune.pruner import save_pruned_model

    from recipes.runtime import nemo_api
    from recipes.runtime.data.folder import DataFolder

    prune = cfg.prune
    batches = math.ceil(prune.calibration_samples / prune.micro_batch_size)
    model, trainer = nemo_api.restore(
        inputs["teacher"],
        pipeline_model_parallel_size=prune.pipeline_model_parallel_size,
        modelopt_spec=True,
        max_steps=batches,
        limit_val_batches=batches,
        val_check_interval=batches,
    )
    core = nemo_api.core_model(model)
    teacher_params = nemo_api.count_parameters(core)
    nemo_api.number_layers(core)
    # As nemo's prune_language_model does, whose own forward loop also opens a log folder in the working directory.
    calibration_loss = None
    if prune.drop_layers:
        mtp.plugins.drop_mcore_language_model_layers(model, layers_to_drop=list(prune.drop_layers))
    else:
        data = _calibration_data(model, prune, DataFolder.read(inputs["data"]), cfg.seed, out)
        mtp.prune(
            model,
            mode="mcore_minitron",
            constraints={"export_config": _targets(prune, core.config)},
            dummy_input=None,
            config={"forward_loop": lambda _: trainer.validate(model, data, verbose=False)},
        )
        calibration_loss = _plausible(trainer, core.config.vocab_size)
    metrics: dict[str, Any] = {
        "params_before": teacher_params,
        "params": nemo_api.count_parameters(core),
        "calibration_loss": calibration_loss,
        "kept_layers": nemo_api.kept_layers(core),
    }
    if rank() == 0:
        shutil.rmtree(out / "nemo", ignore_errors=True)
    trainer.strategy.barrier()
    save_pruned_model(trainer, str(out / "nemo"))
    return metrics


def _targets(prune: PruneConfig, teacher: Any) -> dict[str, int]:
    """The sizes asked for. ModelOpt wants heads and query groups together: the one not named keeps its size."""
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    targets = {name: value for name in names if (value := getattr(prune, name)) is not None}
    if "num_attention_heads" in targets or "num_query_groups" in targets:
        targets.setdefault("num_attention_heads", teacher.num_attention_heads)
        targets.setdefault("num_query_groups", teacher.num_query_groups)
    return targets


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
    stage_main(run, "prune")
