"""Prepare the documents of a data section: plan, shared work, and completion of the folder.

Every process that works on a folder runs the same code: it claims shards until all are complete, waits for the shards
of others (and takes them over if their owners die), and completes the folder unless another process has done so.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property
from pathlib import Path
from typing import Any

from prune_distill.data.declare import declare
from prune_distill.data.encoder import TokenizersEncoder, choose
from prune_distill.data.folder import DataFolder
from prune_distill.data.plan import VALIDATION, Shard, described, holdout_every, make_plan
from prune_distill.data.readers import Lines
from prune_distill.data.shards import publish, read_manifest
from prune_distill.data.tokenizer import read_tokenizer
from prune_distill.data.work import Made, Settings, check_lines, make_shard, start_worker
from prune_distill.data.worklist import Worklist
from prune_distill.errors import InputError
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.metrics_file import MetricsFile
from prune_distill.pipeline.names import DATA, METRICS, PLAN, SHARDS, STATE, STOP
from prune_distill.pipeline.stage_main import PausedError
from prune_distill.schema import DataConfig, DocumentFormat, Learn

log = logging.getLogger("recipes.prepare")

POLL_SECONDS = 5.0
LOG_SECONDS = 15.0
# Maximum number of faulty shards in a message.
MAX_FAULTS = 10
COMPLETION = "whole"


def prepare(
    data: DataConfig,
    files: Mapping[str, Sequence[str]],
    tokenizer_folder: Path,
    out: Path,
    seed: int,
    source_tokenizer: Path | None = None,
) -> DataFolder:
    """Prepare a data folder, or the missing parts of it.

    Args:
        files: files by source, and of `validation`; without `validation`, documents of the sources are held out.
        tokenizer_folder: a Hugging Face model folder; its `config.json` limits the token ids.
        source_tokenizer: the folder of the tokenizer of sources in the format `tokens`.

    Raises:
        InputError: a tokenizer without end-of-sequence token or with ids outside the model's vocabulary, files that
            cannot be read, too many invalid lines, a split without documents.
        PausedError: `out` contains a stop file.
    """
    tokenizer = read_tokenizer(tokenizer_folder)
    other = None if source_tokenizer is None else read_tokenizer(source_tokenizer, model=False)
    plan = make_plan(data, files, tokenizer, other, seed)
    _check_plan(out / PLAN, described(plan))
    encoder, reason = choose(tokenizer)
    log.info("%d shards; encoder %s: %s", len(plan), encoder, reason)
    every = 0 if VALIDATION in files else holdout_every(data, plan)
    if every:
        log.info("one in %d documents is held out (data.holdout_every)", every)
    settings = Settings(data, seed, tokenizer, other, every, needs_masks(data, plan))
    worklist = Worklist(out / "claims", data.stale_seconds)
    with worklist.heartbeat():
        _Workers(plan, out, worklist, settings, encoder).work()
        for shard in plan:  # a shard may come from a run that allowed more invalid lines
            check_lines(Lines(**read_manifest(shard_folder(out, shard))["lines"]), data.max_invalid_fraction)
        while not (out / DATA).exists():
            if worklist.claim([COMPLETION]) is None:
                time.sleep(1)
            elif not (out / DATA).exists():
                declare(data, plan, out, tokenizer, seed)
    return DataFolder.read(out)


def needs_masks(data: DataConfig, plan: Sequence[Shard]) -> bool:
    """Return whether some tokens may not be learned. Then all shards have masks."""
    return data.learn is not Learn.all or any(shard.format is DocumentFormat.ids for shard in plan)


def shard_folder(out: Path, shard: Shard) -> Path:
    return out / SHARDS / shard.name


def stop_files() -> list[str]:
    """Return the stop files for this process: that of the stage and, last, that of this task of a job array."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    return [STOP] if task is None else [STOP, f"{STOP}.{task}"]


class _Workers:
    """Worker processes: claims shards for them, publishes their results, and logs the progress."""

    def __init__(self, plan: Sequence[Shard], out: Path, worklist: Worklist, settings: Settings, encoder: str) -> None:
        self.plan = {shard.name: shard for shard in plan}
        self.out, self.worklist, self.settings, self.encoder = out, worklist, settings, encoder
        self.workers = min(settings.data.num_workers or _cores(), len(plan))
        self.faults: dict[str, str] = {}
        (out / SHARDS).mkdir(parents=True, exist_ok=True)
        self.done: set[str] = set()
        self._list_complete()
        self.progress = _ShardProgress(self.plan, self.done, out)

    def work(self) -> None:
        """Work until all shards are complete."""
        if len(self.done) == len(self.plan):
            return
        log.info("%d worker processes", self.workers)
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self.workers, context, start_worker, (self.settings,))
        running: dict[Future[Made], str] = {}
        try:
            while len(self.done) < len(self.plan):
                asked_to_pause = any((self.out / name).exists() for name in stop_files())
                if not asked_to_pause:
                    self._fill(pool, running)
                if self.faults and not running:
                    raise InputError("; ".join(self.faults.values()))
                if asked_to_pause and not running:
                    self._pause()
                ended, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                finished = [(running.pop(future), future) for future in ended]
                if not asked_to_pause:
                    self._fill(pool, running)  # first, so that no worker waits for the comparison of samples
                for name, future in finished:
                    self._collect(pool, running, name, future)
                if not running and not ended:
                    time.sleep(1)  # other processes work on the rest
                self._list_complete()
                self.progress.show(self.done)
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process was killed (out of memory?); complete shards are kept; run again, with a lower"
                " data.num_workers if memory was short"
            ) from error
        except BaseException:
            # Their shards are started again next time; waiting for them would take minutes.
            for process in list((pool._processes or {}).values()):
                process.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            for name in self.worklist.held:
                shutil.rmtree(self._partial(name), ignore_errors=True)  # so that partial files do not fill the disk

    def _fill(self, pool: ProcessPoolExecutor, running: dict[Future[Made], str]) -> None:
        while len(running) < self.workers and len(self.faults) < MAX_FAULTS:
            name = self.worklist.claim(name for name in self.plan if name not in self.done and name not in self.faults)
            if name is None:
                return
            if shard_folder(self.out, self.plan[name]).exists():  # completed in the meantime
                self.done.add(name)
                self.worklist.release(name)
                continue
            running[pool.submit(make_shard, self.plan[name], self._partial(name), self.encoder)] = name

    def _partial(self, name: str) -> Path:
        return self.out / SHARDS / f".{name}.{os.uname().nodename}.{os.getpid()}"

    def _pause(self) -> None:
        """Stop this process; the same command resumes. The stop file of the whole array stays, for the other tasks."""
        write_json(self.out / STATE, {"state": "paused", "step": len(self.done)})
        (self.out / stop_files()[-1]).unlink(missing_ok=True)
        raise PausedError(f"paused with {len(self.done)} of {len(self.plan)} shards complete")

    def _collect(
        self, pool: ProcessPoolExecutor, running: dict[Future[Made], str], name: str, future: Future[Made]
    ) -> None:
        try:
            made = future.result()
        except InputError as fault:
            self.faults[name] = str(fault)
        else:
            text = self.own.find_mismatch(made.samples) if made.samples else None
            if text is not None:
                note = f"fastokens returned other ids for {text[:40]!r}"
                log.warning("shard %s is encoded again with the model's tokenizer: %s", name, note)
                again = pool.submit(make_shard, self.plan[name], self._partial(name), TokenizersEncoder.name, note)
                running[again] = name
                return
            publish(self._partial(name), shard_folder(self.out, self.plan[name]), made.manifest)
        self.worklist.release(name)

    @cached_property
    def own(self) -> TokenizersEncoder:
        """The reference for fastokens."""
        return TokenizersEncoder(self.settings.tokenizer)

    def _list_complete(self) -> None:
        self.done |= {name for name in os.listdir(self.out / SHARDS) if name in self.plan}


class _ShardProgress:
    """Logs how many shards are complete, by any process, and writes it to `metrics.jsonl`."""

    def __init__(self, plan: Mapping[str, Shard], done: set[str], out: Path) -> None:
        self.plan, self.out = plan, out
        self.started = self.last = time.monotonic()
        self.known = set(done)
        self.bytes_before = sum(plan[name].bytes for name in done)
        self.bytes = sum(shard.bytes for shard in plan.values())
        self.tokens = 0
        # Only the first array task writes the file.
        first = os.environ.get("SLURM_ARRAY_TASK_ID", "0") == "0"
        self.metrics = MetricsFile(out / METRICS) if first else None

    def show(self, done: set[str]) -> None:
        now, every = time.monotonic(), LOG_SECONDS
        if now - self.last < every and len(done) < len(self.plan):
            return
        self.last = now
        for name in done - self.known:
            manifest = read_manifest(shard_folder(self.out, self.plan[name]))
            self.tokens += manifest["train"]["tokens"] + manifest["validation"]["tokens"]
        self.known |= done
        worked = sum(self.plan[name].bytes for name in done)
        seconds = now - self.started
        speed = self.tokens / seconds
        rate = (worked - self.bytes_before) / seconds
        left = (self.bytes - worked) / rate if rate else None
        log.info(
            "%d of %d shards, %.1f %%, %s tokens/s, %s left",
            *(len(done), len(self.plan), 100 * worked / max(1, self.bytes), f"{speed:,.0f}"),
            "unknown time" if left is None else f"{left / 60:,.1f} min",
        )
        if self.metrics is not None:
            values = {} if left is None else {"tokens_per_second": speed, "seconds_left": left}
            self.metrics.append(step=len(done), max_steps=len(self.plan), **values)


def _check_plan(path: Path, plan: list[dict[str, Any]]) -> None:
    """Write the plan, or check that the existing plan is equal."""
    if not path.exists():
        write_json(path, plan)
    if json.loads(path.read_text()) != json.loads(json.dumps(plan)):
        raise InputError(
            f"the files or settings differ from those in {path}: they have changed, or the folder belongs to another "
            "data"
            f" section; remove {path.parent} to start again"
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
