"""python -m recipes quantize.FORMAT --config RUN_DIR/resolved.yaml

Quantize the exported student after training, with ModelOpt, and write it in a format that vLLM reads. The stage reads
the result back with plain PyTorch, and compares its logits with ModelOpt's simulation of the format.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from convert.files import replace_folder
from convert.model_card import quantized_model_card
from prune_distill.data.folder import DataFolder
from prune_distill.model import hf_config
from prune_distill.model.huggingface import copy_side_files
from prune_distill.nemo import hf_models
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.names import quantized_name
from prune_distill.pipeline.run_arguments import Metrics
from prune_distill.quantization import compressed_tensors, modelopt
from prune_distill.quantization.calibration import calibration_batches
from prune_distill.quantization.check import check_export
from prune_distill.schema import QuantizeConfig, RunConfig

log = logging.getLogger("recipes.quantize")

FIX = "use a machine with more memory, or lower quantize.micro_batch_size or quantize.calibration_seq_length"


@dataclass(frozen=True)
class Inputs:
    """The student's Hugging Face folder, and prepared data."""

    student: Path
    data: Path


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Output: `student_FORMAT/`, a Hugging Face folder."""
    (quant_format,) = cfg.quantize.formats  # each format is a stage
    folder = out / quantized_name(quant_format)
    hf_models.check_fits([("model", hf_models.weight_bytes(inputs.student))], FIX)
    model = hf_models.load(inputs.student)
    batches = calibration_batches(DataFolder.read(inputs.data), cfg.quantize, cfg.seed, model.device)
    learned, fp8_kv_cache = cfg.distill.quantize is quant_format, cfg.quantize.fp8_kv_cache
    if quant_format.needs_calibration(learned=learned, fp8_kv_cache=fp8_kv_cache):
        log.info("%s: %d calibration sequences", quant_format.value, sum(map(len, batches)))
    modelopt.quantize(
        model,
        quant_format,
        cfg.quantize.int4_group_size,
        cfg.quantize.keep,
        batches,
        learned=learned,
        fp8_kv_cache=fp8_kv_cache,
    )
    with torch.inference_mode():
        simulated = model(batches[0][:1]).logits
    title = f"{cfg.name}: {folder.name}"
    kept = modelopt.list_kept(model)
    with replace_folder(folder, inputs.student) as partial:
        _write(model, kept, inputs.student, partial, cfg.quantize)
        card = quantized_model_card(title, inputs.student, quant_format, kept, cfg.quantize, learned=learned)
        (partial / "README.md").write_text(card)
        del model
        error = check_export(partial, batches[0][:1], simulated)
    before, after = _file_bytes(inputs.student), _file_bytes(folder)
    log.info("%s: %.1f MB instead of %.1f", folder.name, after / 1e6, before / 1e6)
    return {"kept_layers": kept, "bytes": after, "bytes_before": before, "export_error": error}


def _write(model: Any, kept: list[str], student: Path, folder: Path, cfg: QuantizeConfig) -> None:
    """Write weights, config, tokenizer and generation config to a folder."""
    (quant_format,) = cfg.formats
    if quant_format in compressed_tensors.FORMATS:
        weights, scales = modelopt.weights(model), modelopt.weight_scales(model)
        compressed_tensors.write_weights(folder, quant_format, weights, scales, modelopt.kv_scales(model))
        quantization = compressed_tensors.build_config(
            quant_format, cfg.int4_group_size, kept, fp8_kv_cache=cfg.fp8_kv_cache
        )
    else:
        modelopt.export(model, folder)
        quantization = hf_config.parse(folder / "config.json")["quantization_config"]
    copy_side_files(student, folder)
    config = hf_config.make_compatible(hf_config.read_config(student / "config.json"))
    write_json(folder / "config.json", {**config, "quantization_config": quantization})


def _file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
