"""python -m recipes.evaluate --config RUN_DIR/resolved.yaml

Held-out loss and perplexity of the Hugging Face models of a run: what users will deploy, loaded by plain transformers.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from conf.errors import InputError
from conf.schema import EvaluateConfig, RunConfig
from recipes.artifact import write_json
from recipes.runtime.stage_main import stage_main

log = logging.getLogger("recipes.evaluate")


def run(cfg: RunConfig, inputs: dict[str, Any], out: Path) -> dict[str, Any]:
    """Inputs: data, and a Hugging Face folder (or Hub id) a model. Output: `evaluation.json`."""
    from recipes.runtime.data.folder import DataFolder
    from recipes.runtime.huggingface import local_folder

    data = DataFolder.read(inputs["data"])
    models = {name: source for name, source in inputs.items() if name != "data"}
    results = {}
    for name, source in models.items():
        folder = local_folder(source, cfg.model.revision if name == "teacher" else None, weights=True)
        results[name] = evaluate_model(folder, data, cfg.evaluate)
        log.info("%s: held-out loss %.4f nats per token", name, results[name]["val_loss"])
    write_json(out / "evaluation.json", results)
    return results


def evaluate_model(folder: Path, data: Any, cfg: EvaluateConfig) -> dict[str, Any]:
    """Parameters, sizes and held-out loss of one Hugging Face model.

    The loss is the mean over all tokens of the validation documents laid end to end and cut into sequences of
    `cfg.seq_length`, end-of-document tokens included.

    Returns:
        the model's entry of the report; `val_loss` in nats per token, `bits_per_byte` of the documents' UTF-8 text.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from recipes.runtime import backend

    sequences = torch.from_numpy(data.validation_sequences(cfg.seq_length))[: cfg.max_sequences]
    if not len(sequences):
        raise InputError(
            f"the validation documents hold {data.validation_tokens} tokens, less than evaluate.seq_length"
            f" {cfg.seq_length}; set it lower or bring more documents"
        )
    device = backend.torch_device()
    # transformers before 4.56 knows the type by this name only; later ones know both.
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").to(device).eval()
    total = 0.0
    with torch.inference_mode():
        for batch in sequences.split(cfg.micro_batch_size):
            ids = batch.to(device)
            logits = model(ids[:, :-1], use_cache=False).logits.float()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            ).item()
    tokens = sequences.shape[0] * cfg.seq_length
    loss = total / tokens
    config = model.config
    return {
        "params": model.num_parameters(),
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "val_loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": loss / math.log(2) * data.validation_tokens / data.validation_bytes,
        "tokens": tokens,
    }


if __name__ == "__main__":
    stage_main(run, "evaluate")
