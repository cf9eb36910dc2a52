"""Names of files and folders that stages, launchers and reports share. No torch.

Programs outside this repository read some of them, so they must not change.
"""

from __future__ import annotations

import re
from pathlib import Path

from prune_distill.schema import QuantFormat

# In the folder of a run: its config, the plan, a line per launch (time and command), and the file that its launcher
# locks, as do stages that outlive the launcher.
RESOLVED = "resolved.yaml"
PLAN = "plan.json"
LAUNCHES = "launches.jsonl"
LOCK = ".lock"
DISTILLED = "distilled"  # in evaluations and reports, the student before on-policy rounds
REPORT = "report"  # the last stage and its folder: `REPORT_JSON` for programs, `REPORT_PAGE` for people
REPORT_JSON = "report.json"
REPORT_PAGE = "index.html"
SLURM = "slurm"  # the scripts of a run's jobs; `JOBS`: their ids by stage
JOBS = "jobs.json"

# In the folder of a stage.
MANIFEST = "manifest.json"  # written last
OUTPUTS = "outputs.json"  # size and CRC-32 of each file that the stage wrote
LOG = "log.txt"
METRICS = "metrics.jsonl"
# Of the last attempt: {"state": "started"} by a launcher, until the stage ends; then, or by a training stage,
# {"state": "paused" or "done", "step": N}. A paused or interrupted stage resumes when it is started again. Only the
# manifest marks a stage as complete.
STATE = "state.json"
# A file of this name asks a training stage to save and pause. The launcher removes both when it starts a stage.
STOP = "stop"
CHECKPOINTS = "checkpoints"  # for resuming a training
NEMO = "nemo"  # the output model as a NeMo checkpoint
HF = "hf"  # the output model as a Hugging Face folder
CORPUS_TRAIN = "corpus/train.jsonl"  # the documents of the demo
CORPUS_VALIDATION = "corpus/validation.jsonl"
CHOICE = "choice.json"  # the shape that a search or successive halving chose: sizes and layers to drop
CANDIDATES = "candidates.json"  # all shapes that a search scored, best first, and what successive halving added
WINNER = "winner"  # the candidate whose distillation continues
EVALUATION = "evaluation.json"  # measurements of each model
SAMPLES = "samples.json"  # continuations of the same texts by each model
RECOVERY = "recovery.json"  # measurements of the checkpoints of a distillation
MEASURED = "measured"  # stored measurements, one file per model and part
ROOM = "recovery"  # checkpoints of a distillation, held until they are measured
DATA = "data.json"  # content of prepared data, written last; `SHARDS`: their parts
SHARDS = "shards"
IMPORTANCE = "importance.json"
BENCHMARK = "benchmark.json"

# In a NeMo checkpoint.
WEIGHTS = "weights"
CONTEXT = "context"
TOKENIZER = "tokenizer"  # in the context

_CHECKPOINT = re.compile(r"step=(0|[1-9]\d*)")
_STAGE_FOLDER = re.compile(r"([a-z_]+(?:\.[a-z_0-9]+)*)-[0-9a-f]{8}")


def parse_stage_folder(name: str) -> str | None:
    """Return the stage of a folder's name, `<stage>-<hash8>`; None if it is another name."""
    match = _STAGE_FOLDER.fullmatch(name)
    return match[1] if match is not None else None


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint after a step."""
    return f"step={step}"


def find_checkpoints(folder: Path) -> dict[int, Path]:
    """Find the checkpoints in a folder by step, in order; none if it does not exist. Other names are ignored."""
    found = {}
    for path in folder.glob("step=*"):
        match = _CHECKPOINT.fullmatch(path.name)
        if match is not None and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def cache_stage(number: int) -> str:
    """Return the name of the stage that caches the logits of teacher `number`; 0: the teacher of the run."""
    return f"cache_logits.source_teacher{number}" if number else "cache_logits"


def cached_logits_name(number: int) -> str:
    """Return the name of a distillation's input with the logits of teacher `number`; 0: the teacher of the run."""
    return f"source_teacher{number}" if number else "cached_logits"


def quantized_name(quant_format: QuantFormat) -> str:
    """Return the name of the student in a quantized format: of its folder, and in reports."""
    return f"student_{quant_format.value}"
