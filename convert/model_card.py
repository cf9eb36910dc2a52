"""The model card (`README.md`) of an exported model: its source, how it was made, and metadata for the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from convert.families import read_config
from prune_distill.config.wording import ranges
from prune_distill.model.hf_config import HfConfig
from prune_distill.model.hf_shape import may_be_hub_id, parse_shape
from prune_distill.pipeline.artifact import read_manifest
from prune_distill.schema import QuantFormat, QuantizeConfig

_SIZES = {
    "num_layers": "layers",
    "hidden_size": "hidden size",
    "ffn_hidden_size": "FFN size",
    "num_attention_heads": "attention heads",
    "num_query_groups": "query groups",
}


_VLLM = (
    "vLLM 0.32 reads it. The repository that wrote it serves small models in this format on CPUs in its tests; it has"
    " not tried GPUs."
)
_NOT_READ = "vLLM 0.32 does not read mixtures of experts in this format."
_UNTRIED = "Made for vLLM on {gpus} GPUs. The repository that wrote it has not tried it there."
_CALIBRATED = "Ranges were calibrated on up to {samples} sequences of {tokens} tokens of the training data."
_ROUNDED = "Weights are rounded to nearest, without calibration."
# What is quantized, how, and which engine reads it.
_FORMATS = {
    QuantFormat.fp8: (
        "FP8 (E4M3) weights with a scale per output channel, and activations with a scale per token",
        _ROUNDED,
        _VLLM,
    ),
    QuantFormat.fp8_tensor: (
        "FP8 (E4M3) weights and activations with one scale per tensor",
        _CALIBRATED,
        _UNTRIED.format(gpus="NVIDIA"),
    ),
    QuantFormat.nvfp4: (
        "FP4 (E2M1) weights and activations in blocks of 16, with scales in FP8",
        _CALIBRATED,
        _UNTRIED.format(gpus="NVIDIA Blackwell"),
    ),
    QuantFormat.int8: (
        "INT8 weights with a scale per output channel, and activations with a scale per token (compressed-tensors)",
        _ROUNDED,
        _VLLM,
    ),
    QuantFormat.int4: (
        "INT4 weights with a scale for each {group} (compressed-tensors); activations keep their type",
        "The ranges of the weights were found by AWQ's clipping search on tokens of the training data, without AWQ's"
        " scaling of channels.",
        _VLLM,
    ),
}
_FP8_KV_CACHE = "Engines keep keys and values in FP8 (E4M3), with the scale of each layer in this folder."


@dataclass
class Provenance:
    """The stages that produced a checkpoint, from the folders of its run.

    Attributes:
        stages: names of the stages, newest first.
        sentences: descriptions of the stages with known metrics, newest first.
    """

    stages: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, checkpoint: Path) -> Provenance:
        """Follow a checkpoint's stage folder back to the first student of the run.

        A `manifest.json` from elsewhere may contain anything, even a reference to itself; it ends the search.
        """
        provenance = cls()
        folder, seen = checkpoint.parent, set[Path]()
        try:
            while (place := folder.resolve()) not in seen and (manifest := read_manifest(folder)) is not None:
                seen.add(place)
                provenance.stages.append(manifest["stage"].split(".")[0])
                with suppress(KeyError, TypeError, ValueError, AttributeError):
                    provenance.sentences += _describe(provenance.stages[-1], manifest["metrics"])
                folder = (folder.parent / manifest["inputs"]["student"]["path"]).parent
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
            pass
        return provenance


def _describe(stage: str, metrics: dict[str, Any]) -> list[str]:
    """Describe a stage in at most one sentence. Raises: KeyError and others, if its metrics are not as expected."""
    if stage == "prune":
        kept = metrics.get("kept_layers")
        return [
            f"Pruned with NVIDIA ModelOpt (Minitron) from {metrics['params_before']:,} to"
            f" {metrics['params']:,} parameters" + (f"; layers kept: {ranges(kept)}." if kept else ".")
        ]
    if stage == "correct_teacher":
        return [
            f"Trained as a language model on {metrics['tokens']:,} tokens of the distillation's data; held-out"
            f" loss {metrics['val_loss_before']:.4f} before, {metrics['val_loss_after']:.4f} after."
        ]
    if stage == "distill":
        loss = metrics.get("val_loss")
        return [
            f"Trained on {metrics['tokens']:,} tokens in {metrics['steps']:,} steps after pruning"
            + (f"; validation loss {loss:.4f} nats per token." if loss is not None else ".")
        ]
    return []


def model_card(
    name: str, base: str, reference: Path, config: HfConfig, provenance: Provenance, note: str | None = None
) -> str:
    """Return a card in the Hub's format (huggingface.co/docs/hub/model-cards).

    Args:
        name: name of the exported model.
        base: Hub id or name of the source model.
        reference: folder of the source model, whose card may state a license.
        config: the exported `config.json`.
        note: a sentence on the training, used if the model was distilled.
    """
    on_the_hub = may_be_hub_id(base) and not Path(base).exists()
    if not on_the_hub:
        base = Path(base).resolve().name  # do not publish a local path
    metadata: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if on_the_hub:
        metadata |= {"base_model": base, "base_model_relation": "finetune"}
    metadata |= {key: value for key, value in _front_matter(reference).items() if key.startswith("license")}
    before, after = parse_shape(read_config(reference)), parse_shape(config)
    table = [
        f"| {words} | {getattr(before, size)} | {getattr(after, size)} |"
        for size, words in _SIZES.items()
        if getattr(before, size) != getattr(after, size)
    ]
    distilled = "distill" in provenance.stages
    metadata["tags"] = ["nemo", *(["minitron", "pruning"] if table else []), *(["distillation"] if distilled else [])]
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False).strip(), "---", "", f"# {name}", ""]
    lines += [f"Made from {base}.", *reversed(provenance.sentences)]
    if note and distilled:
        lines.append(note)
    if table:
        lines += ["", f"| | {base} | this model |", "|---|---|---|", *table]
    lines += [
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        "```",
        "",
    ]
    return "\n".join(lines)


def quantized_model_card(
    name: str, student: Path, quant_format: QuantFormat, kept: Sequence[str], cfg: QuantizeConfig, *, learned: bool
) -> str:
    """Return the card of a quantized model.

    Args:
        name: name of the quantized model.
        student: folder of the model that was quantized, whose card continues this one.
        kept: names of its linear layers that are not quantized.
        learned: whether the student was distilled with fake quantization to this format.
    """
    metadata = _front_matter(student)
    tags = metadata.get("tags")
    metadata["tags"] = [*(tags if isinstance(tags, list) else []), quant_format.value]
    if "base_model_relation" in metadata:
        metadata["base_model_relation"] = "quantized"
    what, how, engines = (
        text.format(samples=cfg.calibration_samples, tokens=cfg.calibration_seq_length, group=cfg.int4_group_size)
        for text in _FORMATS[quant_format]
    )
    if parse_shape(read_config(student)).num_moe_experts is not None:
        engines = _NOT_READ if quant_format is QuantFormat.fp8 else _UNTRIED.format(gpus="NVIDIA")
    when = "after distillation with its rounding" if learned else "after training"
    patterns = ", ".join(f"`{pattern}`" for pattern in cfg.keep)
    others = f" and those that match {patterns}" if patterns else ""
    body = (student / "README.md").read_text(errors="replace").rpartition("\n---\n")[2].strip()
    title, _, made = body.partition("```python")[0].removeprefix("# ").partition("\n")
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False).strip(), "---", "", f"# {name}", ""]
    lines += [
        f"{title}, quantized with NVIDIA ModelOpt {when}: {what}. {_ROUNDED if learned else how}",
        f"Linear layers that keep their type ({len(kept)}): the output layer, routers{others}.",
        *([_FP8_KV_CACHE] if cfg.fp8_kv_cache else []),
        "",
        engines,
        "",
        "```bash",
        "vllm serve PATH",
        "```",
        "",
        "## The model before quantization",
        made.rstrip(),
        "",
    ]
    return "\n".join(lines)


def _front_matter(folder: Path) -> dict[str, object]:
    """Read the metadata at the top of a model card; empty if there is none."""
    path = folder / "README.md"
    if not path.exists():
        return {}
    head, _, rest = path.read_text(errors="replace").partition("---\n")
    if head.strip() or "---" not in rest:
        return {}
    try:
        metadata = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return metadata if isinstance(metadata, dict) else {}
