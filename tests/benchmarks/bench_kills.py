"""python -m tests.benchmarks.bench_kills [--kills 200] [--seed 0] [--scenarios plain ...] [--out FILE] [--work FOLDER]

Kills processes of tiny runs with SIGKILL at random moments and runs the same command again. Stages come in turn; the
moment and the victim (launcher, torchrun, a rank, a helper) are random. Counts results that differ from an undisturbed
run's, processes that outlive their run, and reruns that fail, whose run folders it keeps as FOLDER/failed-N. Run again,
it goes on after the last kill in FILE.

Each scenario is run twice undisturbed, in two folders: what differs between those two (paths, process ids) is not
compared, nor are times and speeds. An attack copies the first run without the stage that it attacks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prune_distill.pipeline.artifact import Located, read_manifest, write_json
from prune_distill.pipeline.metrics_file import read_metrics
from prune_distill.pipeline.names import LOCK
from prune_distill.pipeline.stage_log import read_attempts
from tests.helpers import tiny

MARK = "BENCH_KILLS_ATTEMPT"
# torchrun gives its ranks 30 s to end.
SECONDS_TO_END = 60.0
SECONDS_A_RUN = 900.0
SHARE_TO_WAIT = 0.2
VICTIMS = ("launcher", "torchrun", "rank", "helper")
SAID = "said.txt"
# Kept for a resume, written next to the results, or (outputs.json) a record of files that are compared themselves.
NOT_COMPARED = ("checkpoints", "tensorboard", "index_mapping", "claims", "outputs.json")
# In the names of times, speeds and what follows from them (`front`: the Pareto front of candidates by their latency),
# two of which may be equal by chance.
TIMES = ("second", "mfu", "latency", ":front")

BASE = (*tiny.DEPTH, "distill.controls=[]")
TWO_RANKS = ("cluster.devices_per_node=2", "prune.pipeline_model_parallel_size=2")
BUDGET = (
    "prune.budget.params_fraction=0.6",
    "prune.budget.max_depth_pruning=0.5",
    "prune.budget.max_width_pruning=0.5",
)
HALVING = (
    "prune.budget.samples=16",
    "prune.successive_halving.candidates=3",
    "prune.successive_halving.round_tokens=512",
)
STORED = ("distill.teacher_logits=cached", "distill.cached_logits_top_k=16", "distill.cached_logits_shard_sequences=5")
ROUNDS = ("prune.rounds=[{steps: 2, drop_layers: [2], ffn_hidden_size: 128}]", "prune.num_layers=2")


@dataclass(frozen=True)
class Scenario:
    """A tiny run.

    Attributes:
        overrides: of `launch.run`.
        stages: that are attacked; none: all of the run's.
        until: its last stage; empty: all of them.
    """

    overrides: tuple[str, ...]
    stages: tuple[str, ...] = ()
    until: str = ""

    def located(self, run_dir: Path) -> dict[str, Located]:
        return tiny.stages(run_dir, *self.overrides)

    def start(self, run_dir: Path, until: str, mark: str = "") -> subprocess.Popen[str]:
        """`launch.run` with its output in `run_dir/said.txt`, and `mark` in the environment of all its processes."""
        words = tiny.command(run_dir, *self.overrides, *(["--until", until] if until else []))
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / SAID).open("w") as said:
            return subprocess.Popen(
                words, env={**tiny.environment(), MARK: mark}, stdout=said, stderr=subprocess.STDOUT, text=True
            )


SCENARIOS = {
    "plain": Scenario(BASE),
    "two_ranks": Scenario((*BASE, *TWO_RANKS), ("importance", "prune", "distill", "evaluate"), "evaluate"),
    "cached_logits": Scenario((*BASE, *STORED), ("cache_logits", "distill"), "distill"),
    "successive_halving": Scenario(
        ("distill.controls=[]", *BUDGET, *HALVING), ("search", "successive_halving", "prune", "distill"), "distill"
    ),
    "rounds": Scenario(
        ("distill.controls=[]", *ROUNDS), ("importance", "prune.round1", "distill.round1", "distill"), "distill"
    ),
}


@dataclass
class Kill:
    """One attack and what came of it.

    Attributes:
        fraction: of the stage's undisturbed time, at which the victim was looked for.
        victim: the kind of the process that was killed.
        missed: the stage ended before; counts as no kill.
        different: results that are not those of the undisturbed run.
        orphans: command lines of processes that outlived their run.
        rerun: exit status of the same command, run again.
        said: its last words, where it failed.
    """

    number: int
    scenario: str
    stage: str
    victim: str
    fraction: float
    missed: bool = False
    first: int | None = None
    rerun: int | None = None
    seconds_to_end: float = 0.0
    different: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    said: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--stages", nargs="+", help="attack only these")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/kills.json"))
    parser.add_argument("--work", type=Path, default=Path("runs/bench/kills"), help="takes the runs, about 1 GB")
    args = parser.parse_args()
    work = args.work.absolute()
    references = {name: Reference(name, work) for name in args.scenarios}
    pairs = [
        (name, stage)
        for name, reference in references.items()
        for stage in reference.attacked
        if not args.stages or stage in args.stages
    ]
    kills = _read(args.out, args.seed)
    while sum(not kill.missed for kill in kills) < args.kills:
        number = len(kills)
        chance = random.Random(f"{args.seed}-{number}")
        scenario, stage = pairs[number % len(pairs)]
        kill = Kill(number, scenario, stage, chance.choice(VICTIMS), round(chance.random(), 3))
        attack(kill, references[scenario], work / "attacked")
        kills.append(kill)
        if kill.different or kill.orphans or (kill.rerun and not kill.missed):
            (work / "attacked").rename(work / f"failed-{number}")  # for whoever looks for the cause
        print(_words(kill), flush=True)
        write_json(args.out, {"seed": args.seed, **summary(kills), "kills": [asdict(kill) for kill in kills]})
    print(json.dumps(summary(kills), indent=1))
    sys.exit(any(summary(kills)[key] for key in ("different", "orphans", "failed")))


def summary(kills: Sequence[Kill]) -> dict[str, Any]:
    """The counts of what must be 0, and of what was attacked."""
    done = [kill for kill in kills if not kill.missed]
    return {
        "count": len(done),
        "missed": len(kills) - len(done),
        "different": sum(bool(kill.different) for kill in done),
        "orphans": sum(bool(kill.orphans) for kill in done),
        "failed": sum(kill.rerun != 0 for kill in done),
        "longest_seconds_to_end": max((kill.seconds_to_end for kill in done), default=0.0),
        "victims": dict(Counter(kill.victim for kill in done)),
        "stages": dict(Counter(f"{kill.scenario}:{kill.stage}" for kill in done)),
    }


def _words(kill: Kill) -> str:
    what = f"{kill.number}: {kill.scenario} {kill.stage}, {kill.victim} at {kill.fraction:.0%}"
    if kill.missed:
        return f"{what}: missed"
    found = [f"rerun ended with {kill.rerun}: {kill.said[-2000:]}"] if kill.rerun else []
    found += [f"different: {', '.join(kill.different[:5])}"] if kill.different else []
    found += [f"orphans: {', '.join(kill.orphans)}"] if kill.orphans else []
    return f"{what}: {'; '.join(found) or 'the same'} (all ended after {kill.seconds_to_end:.0f} s)"


def _read(path: Path, seed: int) -> list[Kill]:
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    if content["seed"] != seed:
        raise SystemExit(f"{path} is of seed {content['seed']}; remove it or set another --out")
    return [Kill(**kill) for kill in content["kills"]]


class Reference:
    """A scenario's undisturbed runs, made where they are not there yet, and the results that both of them have.

    Attributes:
        run_dir: the first of the two.
        attacked: the names of the stages to attack.
        results: by stage.
        seconds: that a stage takes at least, by stage.
    """

    def __init__(self, name: str, work: Path) -> None:
        self.scenario = SCENARIOS[name]
        if name != "plain":
            Reference("plain", work)
        self.run_dir, again = (
            self._run(work / f"{name}{suffix}", work / f"plain{suffix}") for suffix in ("", "-again")
        )
        first, second = self.scenario.located(self.run_dir), self.scenario.located(again)
        self.attacked = self.scenario.stages or tuple(first)
        self.results = {
            name: _same(results(first[name].folder), results(second[name].folder)) for name in self.attacked
        }
        self.seconds = {name: min(_seconds(first[name]), _seconds(second[name])) for name in self.attacked}

    def _run(self, run_dir: Path, plain: Path) -> Path:
        if run_dir != plain and not run_dir.exists():
            copy_without(
                plain, run_dir, [self.scenario.located(run_dir)[stage].folder.name for stage in self.scenario.stages]
            )
        launcher = self.scenario.start(run_dir, self.scenario.until)
        if launcher.wait():
            raise SystemExit(f"the undisturbed run failed: {(run_dir / SAID).read_text()}")
        return run_dir


def copy_without(source: Path, target: Path, folders: Sequence[str]) -> None:
    """A second run folder with the same stages but for those in `folders`."""
    left_out = {*folders, LOCK, SAID}

    def ignored(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(folder) == source and name in left_out]

    shutil.copytree(source, target, symlinks=True, ignore=ignored)


def _seconds(stage: Located) -> float:
    """From a stage's start, imports and all, to its manifest."""
    manifest = read_manifest(stage.folder)
    assert manifest is not None
    return float(manifest["ended"]) - read_attempts(stage.folder / "log.txt")[-1].started


def results(folder: Path) -> dict[str, Any]:
    """What a stage left, by name: the leaves of JSON files, the digests of all others."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") and part != ".metadata" for part in inside.parts)
        if hidden or inside.parts[0] in NOT_COMPARED or not path.is_file() or inside.name.startswith("log"):
            continue
        if path.name == "metrics.jsonl":
            lines = read_metrics(path)
            found |= {f"{inside}:{line['step']}:{key}": value for line in lines for key, value in line.items()}
        elif path.name == "manifest.json":
            found |= _leaves(str(inside), json.loads(path.read_text()).get("metrics"))
        elif path.suffix == ".json":
            found |= _leaves(str(inside), json.loads(path.read_text()))
        else:
            found[str(inside)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _leaves(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: leaf for part, inner in value.items() for key, leaf in _leaves(f"{name}:{part}", inner).items()}
    if isinstance(value, list):
        return {key: leaf for part, inner in enumerate(value) for key, leaf in _leaves(f"{name}:{part}", inner).items()}
    return {name: value}


def _same(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The results of two undisturbed runs that are equal, without times and speeds."""
    timed = {name for name in first if any(part in name for part in TIMES)}
    return {name: first[name] for name in first.keys() & second.keys() - timed if second[name] == first[name]}


def attack(kill: Kill, reference: Reference, run_dir: Path) -> None:
    """Start a stage, kill the victim, run the same command again, and record the result in `kill`."""
    shutil.rmtree(run_dir, ignore_errors=True)
    folder = reference.scenario.located(reference.run_dir)[kill.stage].folder
    copy_without(reference.run_dir, run_dir, [folder.name])
    mark = uuid.uuid4().hex
    launcher = reference.scenario.start(run_dir, kill.stage, mark)
    try:
        kill.missed = not _strike(kill, launcher, run_dir / folder.name, mark, reference.seconds[kill.stage])
        if kill.missed:
            return
        kill.first, kill.seconds_to_end = _wait(launcher), _wait_for_all(mark)
        kill.orphans = [" ".join(_command(pid))[-120:] for pid in _marked(mark)]
        again = reference.scenario.start(run_dir, kill.stage, mark)
        kill.rerun = _wait(again)
        if kill.rerun:
            kill.said = (run_dir / SAID).read_text()
            return
        found = results(run_dir / folder.name)
        kill.different = [name for name, value in reference.results[kill.stage].items() if found.get(name) != value]
    finally:
        for pid in _marked(mark):
            os.kill(pid, signal.SIGKILL)
        launcher.wait()


def _wait(launcher: subprocess.Popen[str]) -> int | None:
    """Its exit status; None where it does not end."""
    try:
        return launcher.wait(SECONDS_A_RUN)
    except subprocess.TimeoutExpired:
        return None


def _strike(kill: Kill, launcher: subprocess.Popen[str], folder: Path, mark: str, seconds: float) -> bool:
    """Wait for the moment and kill; return False if the stage has already ended.

    Helpers come and go: one of the wanted kind is waited for a while, and then any process is taken.
    """
    log = folder / "log.txt"
    while not log.exists() and launcher.poll() is None:
        time.sleep(0.01)
    time.sleep(kill.fraction * seconds)
    until = time.monotonic() + SHARE_TO_WAIT * seconds
    while launcher.poll() is None:
        kinds = {pid: _kind(pid, launcher.pid) for pid in _marked(mark)}
        found = [pid for pid, kind in kinds.items() if kind == kill.victim or time.monotonic() > until]
        if found:
            victim = random.choice(found)
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                kill.victim = kinds[victim]
                return True
        time.sleep(0.005)
    return False


def _kind(pid: int, launcher: int) -> str:
    words, parent = _command(pid), _parent(pid)
    if pid == launcher:
        return "launcher"
    if "torch.distributed.run" in words:
        return "torchrun"
    started = parent == launcher or "torch.distributed.run" in _command(parent)
    return "rank" if started and "recipes" in words else "helper"


def _wait_for_all(mark: str) -> float:
    """The seconds until no process has the mark, at most `SECONDS_TO_END`."""
    started = time.monotonic()
    while any(_marked(mark)) and time.monotonic() - started < SECONDS_TO_END:
        time.sleep(0.1)
    return round(time.monotonic() - started, 1)


def _marked(mark: str) -> Iterator[int]:
    """The running processes that have a mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (place / "environ").read_bytes().split(b"\0"):
                yield int(place.name)


def _command(pid: int) -> list[str]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    return []


def _parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


if __name__ == "__main__":
    main()
