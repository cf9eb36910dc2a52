"""Export NeMo checkpoints to Hugging Face folders by copying bytes. No model is built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from convert import families
from convert.files import replace_folder
from convert.model_card import Provenance, model_card
from convert.nemo_context import read_context
from convert.safetensors_files import read_folder, write_folder
from convert.stored import StoredTensor, copy_threads, report_nonfinite
from convert.torch_dist import TorchDistReader
from convert.torch_save import TORCH_TYPES
from prune_distill.errors import InputError
from prune_distill.model.hf_config import HfConfig, make_compatible
from prune_distill.model.huggingface import copy_side_files
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.names import CONTEXT, TOKENIZER, WEIGHTS
from prune_distill.schema import RunConfig

# safetensors' type for each value of `--dtype` and `convert.export_dtype`; `keep`: the checkpoint's type.
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "keep": None}


def export_model(
    checkpoint: Path,
    reference: Path,
    folder: Path,
    dtype: str,
    *,
    title: str,
    base: str,
    note: str | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Export a NeMo checkpoint to the Hugging Face folder `folder`, atomically.

    `config.json` is the reference's with the sizes that pruning changed; tokenizer, generation config and chat
    template are copied from the reference. NeMo's exporter would write fixed BOS and EOS ids for Qwen3
    (nemo/collections/llm/gpt/model/qwen3.py:498).

    Args:
        reference: the Hugging Face folder of the model that the checkpoint descends from.
        dtype: a key of `DTYPES`.
        title, base, note: for the model card: names of the model and its source, and a sentence on the training.
        allow_nonfinite: whether weights may be non-finite, or become so in the type `dtype`.

    Raises:
        InputError: the checkpoint is damaged, belongs to another family than the reference, or has layers for which
            transformers has no architecture.
    """
    reader = TorchDistReader(checkpoint / WEIGHTS)
    config = build_config(checkpoint, reader, reference)
    tensors = list(families.hf_tensors(reader, config))
    stored = DTYPES[dtype] or tensors[0].dtype
    config["torch_dtype"] = TORCH_TYPES[stored][0]
    with replace_folder(folder, checkpoint, reference) as partial:
        if not write_folder(tensors, partial, dtype=stored, threads=copy_threads()):
            report_nonfinite(tensors, checkpoint, stored, allow=allow_nonfinite)
        copy_side_files(reference, partial)
        write_json(partial / "config.json", make_compatible(config))
        card = model_card(title, base, reference, config, Provenance.read(checkpoint), note)
        (partial / "README.md").write_text(card)


def make_exporter(cfg: RunConfig, reference: Path) -> Callable[[Path, Path], None]:
    """Return a function `export(checkpoint, folder)` that exports a run's checkpoints for evaluation."""

    def export(checkpoint: Path, folder: Path) -> None:
        dtype = cfg.convert.export_dtype.value
        allow = cfg.convert.allow_nonfinite
        title, base = checkpoint.name, cfg.model.name
        export_model(checkpoint, reference, folder, dtype, title=title, base=base, allow_nonfinite=allow)

    return export


def build_config(checkpoint: Path, reader: TorchDistReader, reference: Path) -> HfConfig:
    """Return the `config.json` of a checkpoint: the reference's, with the checkpoint's sizes.

    Depth and width are read from the tensors, so that they are correct for any writer; the division of the attention
    into heads is only recorded in the context.
    """
    config = families.read_config(reference)
    family = families.FAMILIES[config["model_type"]]
    record = read_context(checkpoint)
    if not record.config_class.startswith(f"{family.config(config).module}."):
        raise InputError(
            f"{checkpoint} contains a model of {record.config_class}, but {reference} one of type"
            f" {config['model_type']}; pass the model from which the checkpoint descends"
        )
    sizes = _tensor_sizes(reader, config)
    heads = families.read_heads(config)
    sizes |= {
        "num_attention_heads": record.config.get("num_attention_heads") or heads.num_attention_heads,
        "num_key_value_heads": record.config.get("num_query_groups") or heads.num_query_groups,
        "head_dim": record.config.get("kv_channels") or heads.kv_channels,
    }
    return pruned_config(config, sizes)


def _tensor_sizes(reader: TorchDistReader, config: HfConfig) -> dict[str, int]:
    layers = families.count_layers(reader)
    down = next(rule for rule in families.rules(config) if "linear_fc2.weight" in rule.nemo)
    matrix = families.nemo_tensor(reader, down, (0, 0) if down.experts else (0,))
    hidden, channels = matrix.shape
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden}
    if not down.experts:
        return sizes | {"intermediate_size": channels}
    router = families.nemo_tensor(reader, families.ROUTER, (0,))
    return sizes | {"moe_intermediate_size": channels, "num_experts": router.shape[0]}


def pruned_config(reference: HfConfig, sizes: dict[str, int]) -> HfConfig:
    """Return a source model's `config.json` with other sizes.

    Lists with an entry per layer (`layer_types`) are shortened. If their entries differ, this raises InputError,
    because it is unknown which layers were dropped.
    """
    config = {**reference, **sizes}
    layers = config["num_hidden_layers"]
    if layers == reference["num_hidden_layers"]:
        return config
    if config.get("layer_types"):
        kinds = set(config["layer_types"])
        if len(kinds) > 1:
            raise InputError(f"layer_types={sorted(kinds)}: a pruned model must have layers of a single type")
        config["layer_types"] = config["layer_types"][:1] * layers
    if config.get("max_window_layers"):
        config["max_window_layers"] = min(config["max_window_layers"], layers)
    return config


def open_tensors(folder: Path, reference: Path | None = None) -> dict[str, StoredTensor]:
    """Return the tensors of a Hugging Face folder or NeMo checkpoint by their Hugging Face names.

    Args:
        reference: for a checkpoint, the Hugging Face folder of the model from which it descends; None: the
            `config.json` inside the checkpoint.
    """
    if not is_checkpoint(folder):
        if not (tensors := read_folder(folder)):
            raise InputError(f"{folder} is not a model: it has neither *.safetensors nor a NeMo checkpoint's weights/")
        return tensors
    reader = TorchDistReader(folder / WEIGHTS)
    config = build_config(folder, reader, reference or find_carried_files(folder))
    return {tensor.name: tensor for tensor in families.hf_tensors(reader, config)}


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a NeMo checkpoint."""
    return (folder / WEIGHTS).is_dir()


def find_carried_files(checkpoint: Path) -> Path:
    """Return the tokenizer folder of a checkpoint, which contains the source model's `config.json` after an import.

    Raises:
        InputError: it has no `config.json`.
    """
    folder = checkpoint / CONTEXT / TOKENIZER
    if not (folder / "config.json").exists():
        raise InputError(f"{checkpoint} contains no config.json; pass the Hugging Face model from which it descends")
    return folder
