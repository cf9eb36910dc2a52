"""NeMo's own importers, to compare with: python -m tests.helpers.nemo_importer HF_FOLDER CHECKPOINT [...]"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def import_all(pairs: list[tuple[Path, Path]]) -> None:
    """Import Hugging Face folders as checkpoints, one after the other."""
    from prune_distill.nemo import backend

    backend.activate()
    from nemo.collections import llm

    from prune_distill.nemo.nemo_api import configure

    classes = {
        "qwen3": llm.Qwen3Model,
        "qwen2": llm.Qwen2Model,
        "llama": llm.LlamaModel,
        "mistral": llm.MistralModel,
        "nemotron": llm.NemotronModel,
    }
    for source, checkpoint in pairs:
        kind = json.loads((source / "config.json").read_text())["model_type"]
        importer: Any = classes[kind].importer(f"hf://{source.absolute()}")
        importer.trust_remote_code = False
        config = importer.config
        configure(config)
        # The property builds a new config on each access; a subclass fixes it.
        importer.__class__ = type(type(importer).__name__, (type(importer),), {"config": config})
        importer.apply(checkpoint)


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]]
    import_all(list(zip(paths[::2], paths[1::2], strict=True)))
