"""python -m recipes generate.on_policy1 --config RUN_DIR/resolved.yaml
torchrun --nproc_per_node 8 -m recipes generate.on_policy1 --config RUN_DIR/resolved.yaml

Generate the student's completions of an on-policy round. Several ranks, and tasks of a job array, share the prompts; an
interrupted stage resumes with the missing shards.
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from prune_distill.config.values import require, serve_python
from prune_distill.data.folder import DataFolder
from prune_distill.data.plan import local_files
from prune_distill.data.prepare import COMPLETION, stop_files
from prune_distill.data.tokenizer import TokenizerSpec, read_tokenizer
from prune_distill.data.work import check_lines
from prune_distill.data.worklist import Worklist
from prune_distill.generation.completions import write_data, write_shard
from prune_distill.generation.engines import Engine, open_engine
from prune_distill.generation.prompts import Prompts, cut_prompts, read_prompts
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.metrics_file import MetricsFile
from prune_distill.pipeline.names import DATA, METRICS, SHARDS, STATE, STOP
from prune_distill.pipeline.run_arguments import InputPath, Metrics
from prune_distill.pipeline.stage_main import PausedError, rank
from prune_distill.schema import RunConfig

log = logging.getLogger("recipes.generate")

# How long a process waits for the shards of others before it looks again.
SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class Inputs:
    """The student as a Hugging Face folder, the run's prepared data, and the user's files of prompts, if any."""

    student: Path
    data: Path
    prompts: InputPath | None = None


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Output: `shards/N.jsonl` with the completions as token ids; the same as a data folder: `data.json`,
    `train.{bin,idx}` and `train_mask.{bin,idx}`."""
    tokenizer = read_tokenizer(inputs.student)
    prompts = draw_prompts(cfg, inputs, tokenizer)
    work = _Work(cfg, inputs, out, prompts, tokenizer)
    worklist = Worklist(out / "claims", cfg.data.stale_seconds)
    with worklist.heartbeat():
        work.generate(worklist)
        while not (out / DATA).exists():
            if worklist.claim([COMPLETION]) is None:
                time.sleep(SECONDS_BETWEEN_LOOKS)
            elif not (out / DATA).exists():
                write_data(list(work.shards.values()), out, tokenizer, cfg.distill.seq_length)
    (out / STOP).unlink(missing_ok=True)
    counts = json.loads((out / DATA).read_text())["completions"]
    log.info("%s", ", ".join(f"{name} {value}" for name, value in counts.items()))
    dropped = {"prompts_too_long": prompts.too_long, "prompts_broken": prompts.lines.bad}
    return {"prompts": len(prompts.ids), **dropped, **counts}


def draw_prompts(cfg: RunConfig, inputs: Inputs, tokenizer: TokenizerSpec) -> Prompts:
    """Draw the prompts of the round. Raises: InputError, if there are none, or too many broken records."""
    on_policy = require(cfg.distill.on_policy)
    if inputs.prompts is None:
        prompts = cut_prompts(DataFolder.read(inputs.data), on_policy, cfg.seed)
    else:
        prompts = read_prompts(local_files(inputs.prompts), on_policy, tokenizer, cfg.seed)
        check_lines(prompts.lines, cfg.data.max_invalid_fraction)
    prompts.drop_too_long(on_policy, cfg.distill.seq_length)
    return prompts


class _Work:
    """The shards of a round, which are complete once their file exists."""

    def __init__(self, cfg: RunConfig, inputs: Inputs, out: Path, prompts: Prompts, tokenizer: TokenizerSpec) -> None:
        self.cfg, self.inputs, self.out, self.prompts, self.tokenizer = cfg, inputs, out, prompts, tokenizer
        self.on_policy = require(cfg.distill.on_policy)
        (out / SHARDS).mkdir(exist_ok=True)
        count = -(-len(prompts.ids) // self.on_policy.shard_prompts)
        self.shards = {f"{number:05d}": out / SHARDS / f"{number:05d}.jsonl" for number in range(count)}
        self.progress = _Progress(out, count)

    def generate(self, worklist: Worklist) -> None:
        """Generate shards until all are complete. Raises: PausedError, if `out` contains a stop file."""
        engine: Engine | None = None
        with ExitStack() as stack:
            while missing := [name for name, path in self.shards.items() if not path.exists()]:
                if any((self.out / name).exists() for name in stop_files()):
                    done = len(self.shards) - len(missing)
                    write_json(self.out / STATE, {"state": "paused", "step": done})
                    raise PausedError(f"paused with {done} of {len(self.shards)} shards complete")
                name = worklist.claim(missing)
                if name is None:  # other processes work on the rest
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                    continue
                if not self.shards[name].exists():  # not completed in the meantime
                    engine = engine or stack.enter_context(closing(self._open_engine()))
                    self.progress.add(self._write(name, engine), self._done())
                worklist.release(name)

    def _open_engine(self) -> Engine:
        python = serve_python(self.cfg.benchmark)
        return open_engine(
            self.inputs.student, self.on_policy, self.cfg.distill.seq_length, self.tokenizer.eod_token, python
        )

    def _write(self, name: str, engine: Engine) -> int:
        size = self.on_policy.shard_prompts
        first = int(name) * size
        prompts = self.prompts.ids[first : first + size]
        samples = self.on_policy.samples_per_prompt
        return write_shard(self.shards[name], engine, prompts, first, samples, self.cfg.seed)

    def _done(self) -> int:
        return sum(path.exists() for path in self.shards.values())


class _Progress:
    """Logs this process's speed; that of the first one is also in `metrics.jsonl`, whose steps are shards."""

    def __init__(self, out: Path, count: int) -> None:
        self.count, self.tokens, self.shards, self.started = count, 0, 0, time.monotonic()
        is_first = rank() == 0 and os.environ.get("SLURM_ARRAY_TASK_ID", "0") == "0"
        self.metrics = MetricsFile(out / METRICS) if is_first else None

    def add(self, tokens: int, done: int) -> None:
        """Count a shard of this process; `done`: shards that are complete, by any process."""
        self.tokens += tokens
        self.shards += 1
        speed = self.tokens / (time.monotonic() - self.started)
        log.info("%d of %d shards, %s tokens/s of this process", done, self.count, f"{speed:,.0f}")
        if self.metrics is not None:
            self.metrics.append(step=done, max_steps=self.count, tokens_per_second=round(speed, 1))
