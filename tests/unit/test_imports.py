"""The house's rules on who may import whom, held by reading the sources."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tomllib

import recipes
from prune_distill.pipeline.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
OURS = ("prune_distill", "convert", "recipes", "launch")
STAGE_MODULES = {stage.module for stage in STAGES}
NEED_NEMO = {stage.module for stage in STAGES if stage.needs_nemo}
RUNNER = "recipes.__main__"
CONVERT_COMMANDS = ("convert.hf_to_nemo", "convert.nemo_to_hf", "convert.verify")
# Folders of the library: each may import those before it. Modules next to the folders come before all of them.
FOLDERS = (
    *("schema", "model", "config", "pipeline", "serving", "data", "nemo", "distillation", "training", "quantization"),
    *("evaluation", "pruning", "benchmarking", "generation", "reporting"),
)
# What a login node imports.
NO_TORCH = tuple(
    f"prune_distill.{folder}." for folder in ("schema", "model", "config", "pipeline", "serving", "reporting")
)
NO_TORCH = (*NO_TORCH, "launch.", "recipes.report")
HEAVY = {"torch", "nemo", "megatron", "modelopt", "transformers", "transformer_engine", "lightning", "datasets"}
UPSTREAM = {"nemo", "megatron", "modelopt", "transformer_engine", "lightning"}


@dataclass(frozen=True)
class Import:
    """One imported module: of which file's, and whether at import time or inside a function."""

    by: str
    name: str
    top_level: bool

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.by} imports {self.name}"


def modules() -> Iterator[tuple[str, Path]]:
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            # The stand-in is another distribution's package, and no module of ours imports it.
            if "site" not in path.relative_to(ROOT).parts:
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                yield name.removesuffix(".__init__"), path


def imports_of(name: str, source: str) -> Iterator[Import]:
    def walk(node: ast.AST, top_level: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(name, alias.name, top_level) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name}: relative import"
                yield from (Import(name, f"{child.module}.{alias.name}", top_level) for alias in child.names)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from walk(ast.Module(child.orelse, []), top_level)
            else:
                inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(child, top_level and not inside)

    yield from walk(ast.parse(source), True)


MODULES = {name for name, _ in modules()}
IMPORTS = [found for name, path in modules() for found in imports_of(name, path.read_text())]
# Modules of ours by the module that imports them; `from a import b` may name a module or something in it.
IMPORTED_AT_THE_TOP = {
    by: {
        name
        for found in IMPORTS
        if found.by == by and found.top_level
        for name in (found.name, found.name.rpartition(".")[0])
        if name in MODULES
    }
    for by in MODULES
}


def within(name: str, *places: str) -> bool:
    """Whether a dotted name is one of the places, or inside one that ends in a dot."""
    return any(name == place or (place.endswith(".") and f"{name}.".startswith(place)) for place in places)


def names_package(found: Import, *places: str) -> bool:
    """The same of what is imported, of which `from a import b` may name a module or something in it."""
    return within(found.name, *places) or within(found.name.rpartition(".")[0], *places)


# Package of ours -> what of ours it may import, besides itself.
MAY_IMPORT = {
    "prune_distill": (),
    "convert": ("prune_distill.",),
    # Of convert the library alone: that no stage imports a stage is another rule.
    "recipes": ("convert.", "prune_distill."),
    "launch": tuple(f"prune_distill.{place}" for place in ("schema.", "model.", "config.", "pipeline.", "serving.")),
}


def level(name: str) -> int:
    """The place in `FOLDERS` of a module of the library, -1 for one beside the folders."""
    folder = name.split(".")[1]
    return FOLDERS.index(folder) if (ROOT / "prune_distill" / folder).is_dir() else -1


def report(broken: list[Import]) -> str:
    return "\n".join(map(str, broken))


def test_packages_import_in_one_direction() -> None:
    ours = [found for found in IMPORTS if found.package in OURS and found.package != found.by.partition(".")[0]]
    beside = tuple(f"prune_distill.{path.stem}" for path in (ROOT / "prune_distill").glob("*.py"))
    broken = [found for found in ours if not names_package(found, *MAY_IMPORT[found.by.partition(".")[0]], *beside)]
    assert not broken, report(broken)


def test_folders_of_the_library_import_downwards() -> None:
    inside = [found for found in IMPORTS if found.package == "prune_distill" == found.by.partition(".")[0]]
    broken = [found for found in inside if level(found.name) > level(found.by)]
    assert not broken, report(broken)


def test_no_stage_imports_a_stage() -> None:
    broken = [found for found in IMPORTS if names_package(found, *STAGE_MODULES) and found.by != found.name]
    assert not broken, report(broken)


def test_configs_and_launchers_know_nothing_heavy() -> None:
    broken = [found for found in IMPORTS if within(found.by, *NO_TORCH) and found.package in HEAVY]
    assert not broken, report(broken)


def test_upstream_is_imported_by_the_library_or_stages_that_need_it_or_inside_functions() -> None:
    """Anything else could import it before the backend is activated."""
    # `convert.verify` imports `convert.parity` once the backend is active.
    elsewhere = [found for found in IMPORTS if not within(found.by, "prune_distill.", "convert.parity", *NEED_NEMO)]
    broken = [found for found in elsewhere if found.package in UPSTREAM and found.top_level]
    assert not broken, report(broken)


def upstream_imports(module: str) -> list[Import]:
    """The imports of NeMo's libraries that importing a module makes, in it and in ours that it imports at the top."""
    closure, new = {module}, {module}
    while new:
        new = {name for by in new for name in IMPORTED_AT_THE_TOP[by]} - closure
        closure |= new
    return [found for found in IMPORTS if found.by in closure and found.top_level and found.package in UPSTREAM]


def test_the_stage_table_says_which_modules_need_nemo() -> None:
    """The others are imported with no backend activated."""
    for module in STAGE_MODULES - NEED_NEMO:
        assert not upstream_imports(module), report(upstream_imports(module))
    # The same module in a command that may need no NeMo.
    assert {module for module in NEED_NEMO if not upstream_imports(module)} == {"convert.verify"}


@pytest.mark.parametrize("module", [RUNNER, *(f"recipes.{name}" for name in recipes.COMMANDS), *CONVERT_COMMANDS])
def test_modules_that_run_as_main_import_nothing_heavy_at_the_top(module: str) -> None:
    """A process that saves a checkpoint spawns one that imports its `__main__` again."""
    assert not upstream_imports(module), report(upstream_imports(module))


@pytest.mark.parametrize("module", [RUNNER, "recipes.recovery", *CONVERT_COMMANDS])
def test_importing_a_command_imports_no_torch(module: str) -> None:
    """The runner's helpers import it again, the watcher holds checkpoints first, and the conversions copy bytes."""
    code = f"import sys, {module}; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_recipes_import_at_the_top() -> None:
    """All but the watcher of a training, which has to hold checkpoints before it spends seconds on imports."""
    recipes = [found for found in IMPORTS if within(found.by, "recipes.") and found.by != "recipes.recovery"]
    broken = [found for found in recipes if not found.top_level]
    assert not broken, report(broken)


def test_only_the_runner_imports_stage_modules_by_name() -> None:
    importers = {"import_module", "import_libraries", "run_module", "__import__"}
    found = [
        (name, ast.unparse(node))
        for name, path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in importers
        if any(isinstance(leaf, ast.Attribute) and leaf.attr == "module" for leaf in ast.walk(node))
        if not within(name, "prune_distill.nemo.cpu.")  # its patches have a module, too
    ]
    assert found == [(RUNNER, "import_libraries(stage.module)")]


def test_workers_of_the_data_stage_import_no_torch() -> None:
    """Each would take 350 MB more."""
    code = "import sys, prune_distill.data.prepare; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_nothing_of_the_tests_or_unknown_packages_of_ours_is_imported() -> None:
    assert [found for found in IMPORTS if found.package == "tests"] == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch", [("torch", True)]),
        ("def f():\n    from nemo import x", [("nemo.x", False)]),
        ("class A:\n    import nemo", [("nemo", True)]),
        ("try:\n    import a.b\nexcept ImportError:\n    pass", [("a.b", True)]),
        ("if TYPE_CHECKING:\n    import torch\nelse:\n    import b", [("b", True)]),
    ],
)
def test_the_reader_of_imports(source: str, expected: list[tuple[str, bool]]) -> None:
    assert [(found.name, found.top_level) for found in imports_of("x", source)] == expected


def test_every_package_is_installed() -> None:
    """An editable install finds them all, a wheel only those that are listed."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = [path.parent.relative_to(ROOT) for folder in OURS for path in (ROOT / folder).rglob("__init__.py")]
    packages = [str(path).replace("/", ".") for path in found if "site" not in path.parts]
    assert sorted(listed) == sorted(["conf", *packages])  # conf holds YAML alone


def test_console_commands_name_functions() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_the_reader_found_the_sources() -> None:
    assert {"prune_distill.config.load", "launch.run", "prune_distill.pipeline.stages"} <= {
        found.by for found in IMPORTS
    }


# Each one delays an error to the moment when the function runs.
MOST_FUNCTION_LEVEL_IMPORTS = 38


def test_imports_inside_functions_are_few_and_say_why() -> None:
    """A comment on the line, or above the statements that follow each other, gives the reason."""
    silent: list[str] = []
    count = 0
    for name, path in modules():
        source = path.read_text()
        lines = ["", *source.splitlines()]
        tree = ast.parse(source)
        top = {
            id(node)
            for statement in tree.body
            if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            for node in ast.walk(statement)
        }
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Import, ast.ImportFrom)) or id(node) in top:
                continue
            count += 1
            before = node.lineno - 1
            while lines[before].lstrip().startswith(("import ", "from ")) and "#" not in lines[before]:
                before -= 1
            if "#" not in lines[node.lineno] and "#" not in lines[before]:
                silent.append(f"{name}:{node.lineno}: {lines[node.lineno].strip()}")
    assert not silent, "\n".join(silent)
    assert count <= MOST_FUNCTION_LEVEL_IMPORTS
