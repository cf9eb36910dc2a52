"""Tiny models, quantized by the stage quantize."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from launch.planning.automatic import compose
from prune_distill.nemo import backend
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.names import DATA, MANIFEST, SHARDS
from tests.helpers.models import SMALL, write_model

backend.activate()

from recipes import quantize  # noqa: E402
from tests.helpers.one_rank import VOCABULARY, write_data  # noqa: E402

# Sizes that groups of 32 divide.
SIZES = {"head_dim": 32, "rope_scaling": None}
# As nemo_to_hf writes it, shortened.
CARD = """---
library_name: transformers
base_model: owner/teacher
base_model_relation: finetune
tags:
- nemo
---

# demo: student

Made from owner/teacher.

```python
from transformers import AutoModelForCausalLM
```
"""


def write_student(folder: Path, name: str = "qwen3_untied_bf16", **sizes: object) -> Path:
    write_model(name, folder, **{**SIZES, **sizes})
    (folder / "README.md").write_text(CARD)
    return folder


def write_documents(data: Path) -> None:
    """Write random documents, as prepare_data does."""
    documents = np.random.default_rng(0).integers(3, VOCABULARY, (16, 64)).tolist()
    written = write_data(data, {"text": documents[2:]}, documents[:2])
    validation = {"documents": 2, "tokens": written.validation_tokens, "bytes": written.validation_bytes}
    content = {"vocab_size": SMALL["vocab_size"], "eod_token": 0, "train": written.train, "validation": validation}
    write_json(data / DATA, {**content, "sources": written.sources, "lines": {}})
    shard = data / SHARDS / "0"
    shard.mkdir(parents=True)
    write_json(shard / MANIFEST, {"source": "text"})
    shutil.copyfile(data / "validation.documents", shard / "validation.documents")


def quantize_student(student: Path, quant_format: str, out: Path, overrides: Sequence[str] = ()) -> dict[str, object]:
    """Run the stage on random documents; the model is then in `out/student_FORMAT`."""
    data = out.parent / "data"
    if not data.exists():
        write_documents(data)
    cfg = compose(
        [
            *("experiment=demo", f"run_dir={out.parent}", f"quantize.formats=[{quant_format}]"),
            *("quantize.int4_group_size=32", "quantize.calibration_samples=8", "quantize.calibration_seq_length=32"),
            *overrides,
        ]
    )
    return quantize.run(cfg, quantize.Inputs(student, data), out)
