"""make mutants [MODULES=loss,batches] [SAMPLE=40]: how many small faults do the unit tests of a module notice?

cosmic-ray names the places of a module where a small fault can be put, and makes it: another operator or number, `not`
added, a loop without rounds, a decorator removed. A place gets one fault, drawn like the places with a fixed seed. For
each of them the unit tests of `[tool.mutants]` in pyproject.toml run in a copy of the repository until the first one
fails. A process that has imported the libraries forks for every fault, so that a fault costs its tests alone.

Left out are faults in type annotations, which nothing evaluates, and in lines that end or remove something by number or
name, so that a fault cannot harm the machine.

Writes runs/bench/mutants.json after every fault, and prints a table and the survivors at the end.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "runs" / "bench" / "mutants.json"
SEED = 17
# A fault that makes the tests take so many times as long is noticed.
TIMES = 5
LEAST_SECONDS = 60
# Operators that no one would confuse.
ODD = re.compile(
    r"_(RShift|LShift|BitXor|Pow|Invert|UAdd)|(Add|Sub|Mul|Div|Mod)_Bit|Bit\w+_(Add|Sub|Mul|Div|FloorDiv|Mod)$"
)
DANGEROUS = ("kill(", "killpg(", "setsid", "unlink(", "rmtree(", "rmdir(", "rlimit")


@dataclass(frozen=True)
class Mutant:
    """A fault: cosmic-ray's operator, its how-manieth place in the file, and the line."""

    file: str
    line: int
    operator: str
    occurrence: int


def main() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutants"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", default="", help=f"groups, by commas, of {', '.join(settings)}; all by default")
    parser.add_argument("--sample", type=int, default=40, help="faults of each group (40)")
    arguments = parser.parse_args()
    names = [name for name in arguments.modules.split(",") if name] or list(settings)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder)
        _copy_tracked(copy)
        for name in names:
            _measure(copy, name, settings[name], arguments.sample)
    _print(_results(RESULT))


def _copy_tracked(target: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


def _measure(copy: Path, name: str, group: dict[str, Any], sample: int) -> None:
    """Run a group in a separate process, without imports of other groups."""
    environment = {
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(copy),
        "PYTHONHASHSEED": "0",
    }
    given = json.dumps({"name": name, "group": group, "sample": sample, "result": str(RESULT)})
    command = [sys.executable, "-W", "ignore", "-c", f"from {__spec__.name} import run_group; run_group()", given]
    subprocess.run(command, cwd=copy, env={**os.environ, **environment}, check=True)


def run_group() -> None:
    """In the copy: draws a group's faults, runs its tests on each, and adds to the results after each."""
    given = json.loads(sys.argv[1])
    group, result = given["group"], Path(given["result"])
    places = [mutants for file in _files(group["files"]) for mutants in places_of(file)]
    draw = random.Random(SEED)
    chosen = [draw.choice(mutants) for mutants in draw.sample(places, min(given["sample"], len(places)))]
    _preload(group.get("nemo", False))
    began = time.monotonic()
    if not _passes(group["tests"], 3600):
        sys.exit(f"the tests {group['tests']} fail without any fault")
    limit = max(LEAST_SECONDS, TIMES * (time.monotonic() - began))
    survivors: list[dict[str, Any]] = []
    for number, mutant in enumerate(chosen, 1):
        survived = _survives(mutant, group["tests"], limit)
        if survived:
            survivors.append({**asdict(mutant), "diff": _difference(mutant)})
        print(f"{number}/{len(chosen)}: {'SURVIVES' if survived else 'killed'} {mutant}", file=sys.stderr, flush=True)
        _record(result, given["name"], {"places": len(places), "sample": number, "seed": SEED, "survivors": survivors})


def _files(patterns: list[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in Path().glob(pattern) if path.name != "__init__.py"})


def places_of(path: Path) -> Iterator[list[Mutant]]:
    """The faults that are possible in a file, by the place where they are put."""
    from cosmic_ray.ast import ast_nodes, get_ast_from_path
    from cosmic_ray.plugins import get_operator, operator_names

    source = path.read_text()
    lines, nodes = source.splitlines(), list(ast_nodes(get_ast_from_path(path)))
    # A schema's annotations are read, and count.
    ignored = [] if path.parent.name == "schema" else _annotations(ast.parse(source))
    places: dict[tuple[int, int], list[Mutant]] = {}
    for name in sorted(operator_names()):
        operator_class = get_operator(name)
        if operator_class.arguments() or ODD.search(name):
            continue
        operator = operator_class()
        positions = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, place in enumerate(positions):
            dangerous = any(word in lines[place[0] - 1] for word in DANGEROUS)
            if not dangerous and not any(begin <= place < end for begin, end in ignored):
                places.setdefault(place, []).append(Mutant(str(path), place[0], name, occurrence))
    yield from (places[place] for place in sorted(places))


def _annotations(tree: ast.Module) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where type annotations begin and end, by line and column."""
    found: list[ast.expr | None] = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.AnnAssign, ast.arg)):
            found.append(node.annotation)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(node.returns)
    return [
        ((node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0))
        for node in found
        if node is not None
    ]


def mutated(mutant: Mutant) -> str:
    """The file's text with the fault."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    operator = get_operator(mutant.operator)()
    text: str | None = mutate_code(Path(mutant.file).read_text(), operator, mutant.occurrence)
    assert text is not None
    return text


def _difference(mutant: Mutant) -> str:
    old, new = (text.splitlines() for text in (Path(mutant.file).read_text(), mutated(mutant)))
    return "\n".join(
        line for a, b in zip(old, new, strict=False) if a != b for line in (f"-{a.strip()}", f"+{b.strip()}")
    )


def _preload(nemo: bool) -> None:
    """Import the modules that every child needs, except those that are changed."""
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    if nemo:
        from prune_distill.nemo import backend

        backend.activate()
        # Its own imports are among the modules that are changed.
        kept = ("prune_distill.nemo.backend", "prune_distill.nemo.cpu", "prune_distill.errors")
        for name in [name for name in sys.modules if name.startswith("prune_distill.") and not name.startswith(kept)]:
            del sys.modules[name]


def _survives(mutant: Mutant, tests: list[str], limit: float) -> bool:
    path = Path(mutant.file)
    original, changed = path.read_text(), mutated(mutant)
    path.write_text(changed)
    try:
        return _passes(tests, limit)
    finally:
        path.write_text(original)


def _passes(tests: list[str], limit: float) -> bool:
    """Run tests in a fork of this process, in a new session; a run beyond the limit counts as failed."""
    child = os.fork()
    if child == 0:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout", str(int(limit)), "--tb=no"]
        os._exit(int(pytest.main([*options, *tests])))
    until = time.monotonic() + limit
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _results(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _record(path: Path, name: str, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**_results(path), name: result}, indent=2) + "\n")


def _print(results: dict[str, Any]) -> None:
    print("| modules | places | sample | killed |\n|---|---|---|---|")
    for name, result in results.items():
        killed = result["sample"] - len(result["survivors"])
        print(f"| {name} | {result['places']:,} | {result['sample']} | {killed} ({killed / result['sample']:.0%}) |")
    for name, result in results.items():
        for survivor in result["survivors"]:
            print(f"\n{name} {survivor['file']}:{survivor['line']} {survivor['operator']}\n{survivor['diff']}")


if __name__ == "__main__":
    main()
