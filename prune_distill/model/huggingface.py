"""Locate or download Hugging Face folders, and copy their side files."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from prune_distill.errors import InputError
from prune_distill.model import hf_config, model_folder
from prune_distill.model.hf_tokenizer import SIDE_FILES
from prune_distill.model.hf_weights import PICKLED
from prune_distill.regular_files import folder_faults


def local_folder(
    source: Path | str, revision: str | None, *, weights: bool, allow_pickle: bool = False, model: bool = True
) -> Path:
    """Return the folder of a Hugging Face model. A Hub id is downloaded to the Hub's cache; the download resumes.

    Args:
        weights: whether the weights are needed, or only the other files.
        allow_pickle: whether `pytorch_model*.bin` is accepted as weights.
        model: whether the model must be convertible; otherwise only its tokenizer is used.

    Raises:
        InputError: neither a folder with a config.json nor an available repository, or one that needs code, or
            contains special files (see `prune_distill.regular_files`).
    """
    folder = Path(source)
    if not folder.exists():
        folder = _download(str(source), revision, weights, allow_pickle)
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} holds no config.json; set model.hf_path to a Hugging Face model's folder")
    if model:
        model_folder.check(folder, complete=weights, allow_pickle=allow_pickle)
    elif faults := folder_faults(folder):
        raise InputError("\n".join(faults))
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).exists() and _needs_custom_code(folder / name):
            raise InputError(
                f"{folder / name} needs custom code (auto_map), which is never run; use a model whose"
                " class is part of transformers, or take auto_map out if it needs none of that code"
            )
    return folder


def _needs_custom_code(path: Path) -> bool:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}); fetch it again") from error
    return isinstance(content, dict) and "auto_map" in content


def _download(repository: str, revision: str | None, weights: bool, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download  # takes half a second; only for the Hub

    patterns = ["*.json", "*.jinja", "*.model", "*.txt", "README.md"]
    if weights:
        patterns += ["*.safetensors", *([PICKLED] if allow_pickle else [])]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the Hub client's own errors, and its network library's
        raise InputError(
            f"model.hf_path={repository}: not a folder, and the Hub download failed ({type(error).__name__}: {error});"
            " download it where there is a network and set model.hf_path to its folder"
        ) from error


def hub_commit(folder: Path) -> str | None:
    """Return the commit of a model from the Hub, whose cache has one folder per commit."""
    return folder.name if folder.parent.name == "snapshots" else None


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config, chat template and config.json unchanged."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (*SIDE_FILES, "config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates", dirs_exist_ok=True)


@contextlib.contextmanager
def link_compatible_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder with links to a model's files and a `config.json` for transformers 4 and 5.

    For libraries that load models from a folder with their own version of transformers. The model may be quantized.
    """
    config = hf_config.make_compatible(hf_config.read_unchecked(folder / "config.json"))
    with tempfile.TemporaryDirectory() as name:
        links = Path(name)
        for path in folder.iterdir():
            (links / path.name).symlink_to(path.resolve())
        (links / "config.json").unlink()
        (links / "config.json").write_text(json.dumps(config, indent=2))
        yield links
