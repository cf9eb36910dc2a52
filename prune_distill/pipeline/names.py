"""Names of the files and folders by which stages, launchers and reports find each other's work. No torch.

Programs outside this repository read some of them, so they stay as they are.
"""

from __future__ import annotations

import re
from pathlib import Path

# In the folder of a run: its config, the plan of what it needs, a line per launch (time and command), and the file that
# its launcher locks, and the stages that outlive the launcher.
RESOLVED = "resolved.yaml"
PLAN = "plan.json"
LAUNCHES = "launches.jsonl"
LOCK = ".lock"
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
# Left by the last attempt of a stage that trains: {"state": "paused" or "done", "step": N}. A paused stage resumes when
# it is started again. Only the manifest says that a stage is complete.
STATE = "state.json"
# A file of this name asks a stage that trains to save and pause. Whoever starts a stage removes both.
STOP = "stop"
CHECKPOINTS = "checkpoints"  # what a training resumes from
NEMO = "nemo"  # the model that a stage writes, as a NeMo checkpoint
HF = "hf"  # the same as a Hugging Face folder
CORPUS_TRAIN = "corpus/train.jsonl"  # the documents of the demo
CORPUS_VALIDATION = "corpus/validation.jsonl"
CHOICE = "choice.json"  # the shape that a search or successive halving chose: sizes and layers to drop
CANDIDATES = "candidates.json"  # all shapes that a search scored, best first, and what successive halving added
WINNER = "winner"  # the candidate whose distillation goes on
EVALUATION = "evaluation.json"  # what was measured of each model
SAMPLES = "samples.json"  # what each model continued the same texts with
RECOVERY = "recovery.json"  # what was measured of the checkpoints of a distillation
MEASURED = "measured"  # the same while it is measured, a file of each model and part
ROOM = "recovery"  # checkpoints of a distillation that are held until they are measured
DATA = "data.json"  # what prepared data consist of, written last; `SHARDS`: their parts
SHARDS = "shards"
IMPORTANCE = "importance.json"
BENCHMARK = "benchmark.json"

# In a NeMo checkpoint.
WEIGHTS = "weights"
CONTEXT = "context"
TOKENIZER = "tokenizer"  # in the context

_CHECKPOINT = re.compile(r"step=(0|[1-9]\d*)")


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint that a training saves after a step."""
    return f"step={step}"


def find_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by step, in order; none where it does not exist. Other names are ignored."""
    found = {}
    for path in folder.glob("step=*"):
        match = _CHECKPOINT.fullmatch(path.name)
        if match is not None and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))
