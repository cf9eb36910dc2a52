"""The `README.md` of an exported model: what it was made from and how, with the metadata that the Hub shows."""

from __future__ import annotations

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

_SIZES = {
    "num_layers": "layers",
    "hidden_size": "hidden size",
    "ffn_hidden_size": "FFN size",
    "num_attention_heads": "attention heads",
    "num_query_groups": "query groups",
}


@dataclass
class Making:
    """How a checkpoint came to be, as far as its run's folders tell.

    Attributes:
        stages: the stages that made it, the newest first.
        sentences: about those whose metrics are ours, the newest first.
    """

    stages: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, checkpoint: Path) -> Making:
        """Follows a checkpoint's stage folder back to the first student of the run.

        A folder from elsewhere may have any `manifest.json`, even one that names itself; what no stage wrote ends it.
        """
        making = cls()
        folder, seen = checkpoint.parent, set[Path]()
        try:
            while (place := folder.resolve()) not in seen and (manifest := read_manifest(folder)) is not None:
                seen.add(place)
                making.stages.append(manifest["stage"].split(".")[0])
                with suppress(KeyError, TypeError, ValueError, AttributeError):
                    making.sentences += _sentences(making.stages[-1], manifest["metrics"])
                folder = (folder.parent / manifest["inputs"]["student"]["path"]).parent
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
            pass
        return making


def _sentences(stage: str, metrics: dict[str, Any]) -> list[str]:
    """What a stage did, in at most a sentence. Raises: KeyError or the like, where its metrics are not ours."""
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
            + (f"; held-out loss {loss:.4f} nats per token." if loss is not None else ".")
        ]
    return []


def model_card(name: str, base: str, reference: Path, config: HfConfig, making: Making, note: str | None = None) -> str:
    """A card in the Hub's format (huggingface.co/docs/hub/model-cards).

    Args:
        name: of the exported model.
        base: the source model: a Hub id, or a name.
        reference: its folder, whose own card may state a license.
        config: the exported `config.json`.
        note: on the training, where there was one.
    """
    on_the_hub = may_be_hub_id(base) and not Path(base).exists()
    if not on_the_hub:
        base = Path(base).resolve().name  # a folder of this machine is nobody else's business
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
    distilled = "distill" in making.stages
    metadata["tags"] = ["nemo", *(["minitron", "pruning"] if table else []), *(["distillation"] if distilled else [])]
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False).strip(), "---", "", f"# {name}", ""]
    lines += [f"Made from {base}.", *reversed(making.sentences)]
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


def _front_matter(folder: Path) -> dict[str, object]:
    """The metadata at the head of a model card, if there is one."""
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
