"""Hugging Face folders: finding them, and NeMo's importers and exporters with what they get wrong put right."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from conf.errors import InputError
from recipes.artifact import write_json

log = logging.getLogger("recipes.huggingface")

# Everything of a model's folder that is neither weights nor code nor prose.
CARRIED_OVER = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def local_folder(source: Path | str, revision: str | None, *, weights: bool) -> Path:
    """The folder of a Hugging Face model; a Hub id is downloaded into the Hub's cache.

    Args:
        weights: whether the weights are wanted, or only what describes the model.

    Raises:
        InputError: neither a folder with a config.json nor a repository that can be had, or one that brings code.
    """
    folder = Path(source)
    if not folder.exists():
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.jinja", "*.model", "*.txt", *(["*.safetensors"] if weights else [])]
        try:
            folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
        except Exception as error:  # the Hub client's own errors, and its network library's
            raise InputError(
                f"model.hf_path={source} is no folder and can't be had from the Hub ({type(error).__name__}: {error});"
                " download it where there is a network and set model.hf_path to its folder"
            ) from error
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} holds no config.json; set model.hf_path to a Hugging Face model's folder")
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).exists() and "auto_map" in json.loads((folder / name).read_text()):
            raise InputError(
                f"{folder / name} asks for code of its own (auto_map), which is never run here; use a model whose"
                " class is part of transformers, or take auto_map out if it needs none of that code"
            )
    if weights and not list(folder.glob("*.safetensors")):
        raise InputError(f"{folder} holds no *.safetensors; save the model with safe_serialization=True")
    return folder


def import_model(source: Path, checkpoint: Path, staging: Path) -> None:
    """Writes a Hugging Face model as a NeMo checkpoint, with NeMo's importer on the CPU.

    Put right here: NeMo's Qwen3 importer leaves `head_dim` at 128 whatever config.json says
    (nemo/collections/llm/gpt/model/qwen3.py:308), its Llama importer takes of the rope scaling the factor alone
    (nemo/collections/llm/gpt/model/llama.py:717), and its importers stage the tokenizer in one folder of the whole
    machine, where two imports race (nemo/lightning/io/connector.py:305).

    Args:
        checkpoint: the folder to be written; must not exist.
        staging: a folder for the tokenizer, kept until the import is done.

    Raises:
        InputError: the model is of a family, or has a rope scaling, that is not known here.
    """
    from nemo.collections import llm
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    from recipes.runtime.nemo_api import configure

    model_classes = {"qwen3": llm.Qwen3Model, "llama": llm.LlamaModel}
    hf_config = json.loads((source / "config.json").read_text())
    family = hf_config.get("model_type")
    if family not in model_classes:
        raise InputError(f"{source} holds a {family!r} model; the families known here are {', '.join(model_classes)}")
    copy_side_files(source, staging)
    importer: Any = model_classes[family].importer(f"hf://{source.absolute()}")
    importer.trust_remote_code = False
    config = importer.config
    for name, value in {"kv_channels": head_dim(hf_config), **_llama3_rope(hf_config)}.items():
        # In the object, and in the record of its making that goes into the checkpoint's context.
        setattr(config, name, value)
        setattr(config.__io__, name, value)
    configure(config)
    # Both are properties of the importer, the Llama importer's made anew at each look: a subclass holds them fast.
    fixed = {"config": config, "tokenizer": AutoTokenizer(str(staging))}
    importer.__class__ = type(type(importer).__name__, (type(importer),), fixed)
    importer.apply(checkpoint)


def _llama3_rope(config: dict[str, Any]) -> dict[str, Any]:
    """What NeMo's Llama config must be told of a `config.json`'s rope scaling, besides its factor."""
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise InputError(f"rope scaling of type {kind!r} can't be represented in NeMo; only llama3's can")
    if kind == "default":
        return {}
    return {
        "low_freq_factor": scaling["low_freq_factor"],
        "high_freq_factor": scaling["high_freq_factor"],
        "old_context_len": scaling["original_max_position_embeddings"],
    }


def export_model(checkpoint: Path, reference: Path, out: Path) -> dict[str, Any]:
    """Writes a NeMo checkpoint as a Hugging Face folder, with NeMo's exporter.

    The configuration is the reference's with the sizes that pruning changed; tokenizer, generation config and chat
    template are the reference's own files. NeMo's exporter would write Qwen3's BOS and EOS ids whatever the tokenizer
    (nemo/collections/llm/gpt/model/qwen3.py:498).

    Args:
        reference: the Hugging Face folder of the model that the checkpoint descends from.
        out: written whole or not at all.

    Returns:
        the new `config.json`.
    """
    from nemo.collections import llm

    partial = out.with_name(f".partial.{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    llm.export_ckpt(path=checkpoint, target="hf", output_path=partial, overwrite=True)
    exported = json.loads((partial / "config.json").read_text())
    config = pruned_config(json.loads((reference / "config.json").read_text()), exported)
    for name in CARRIED_OVER:
        (partial / name).unlink(missing_ok=True)
    copy_side_files(reference, partial)
    write_json(partial / "config.json", config)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return config


def pruned_config(reference: dict[str, Any], exported: dict[str, Any]) -> dict[str, Any]:
    """A source model's `config.json` with another model's sizes and weight type.

    Lists with an entry a layer (`layer_types`) are cut: they are refused unless all their entries are the same,
    because which layers were dropped is not known here.
    """
    sizes = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    config = {**reference, **{key: exported[key] for key in sizes}}
    # transformers 4.56 renamed torch_dtype; a reader of either name finds its own.
    dtype = exported.get("dtype", exported.get("torch_dtype"))
    config.pop("dtype", None)
    config["torch_dtype"] = dtype
    layers = config["num_hidden_layers"]
    if layers == reference["num_hidden_layers"]:
        return config
    if "layer_types" in config:
        kinds = set(config["layer_types"])
        if len(kinds) > 1:
            raise InputError(f"layers of several kinds ({', '.join(sorted(kinds))}) cannot be exported after pruning")
        config["layer_types"] = config["layer_types"][:1] * layers
    if "max_window_layers" in config:
        config["max_window_layers"] = min(config["max_window_layers"], layers)
    return config


def copy_side_files(source: Path, target: Path) -> None:
    """Copies tokenizer, generation config and chat template as they are, and config.json with them."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (*CARRIED_OVER, "config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates", dirs_exist_ok=True)


def head_dim(config: dict[str, Any]) -> int:
    """The head size of a `config.json`: its own key, or hidden size over heads where there is none."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
