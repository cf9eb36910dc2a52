"""Find the config keys that a stage reads, in the source of its module and of functions that take the config.

Followed are attributes of the config (`cfg.distill.lr`), names for its groups (`distill = cfg.distill`), properties of
groups, and calls of functions and classes of ours that take the config or a group. Fields named by `getattr` are not.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from functools import cache
from pathlib import Path
from typing import Any

from prune_distill.config.hints import field_hints
from prune_distill.schema import RunConfig

ROOT = Path(__file__).resolve().parents[2]
# The dotted key that a name in the source refers to; "" is the whole config.
Names = dict[str, str]
Definition = ast.FunctionDef | ast.ClassDef


def keys_read(module: str) -> set[str]:
    """The dotted keys that `run` of a stage's module reads; a group where it is handed on as a whole."""
    found: set[str] = set()
    _Reader(module, {"cfg": ""}, found, set()).follow(_definitions(module)["run"])
    return found


def keys_read_of(module: str, name: str) -> set[str]:
    """The dotted keys that the functions of a module read of the config that they have as `name`, such as `run.cfg`."""
    found: set[str] = set()
    for definition in _definitions(module).values():
        _Reader(module, {name: ""}, found, set()).follow(definition)
    return found


_hints = cache(field_hints)


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())


@cache
def _definitions(module: str) -> dict[str, Definition]:
    return {node.name: node for node in _tree(module).body if isinstance(node, Definition)}


@cache
def _imports(module: str) -> dict[str, str]:
    """Dotted names of what a module imports, by its name there."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(_tree(module))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def _find(module: str, name: str) -> tuple[str, Definition] | None:
    """The module and the definition of a function or class of ours, by its name in a module."""
    if name in _definitions(module):
        return module, _definitions(module)[name]
    first, _, rest = name.partition(".")
    place, _, defined = ".".join(filter(None, (_imports(module).get(first, ""), rest))).rpartition(".")
    if not place or not (ROOT / f"{place.replace('.', '/')}.py").is_file() or defined not in _definitions(place):
        return None
    return place, _definitions(place)[defined]


def _text(node: ast.AST) -> str | None:
    """`a.b.c` of a chain of attributes."""
    if isinstance(node, ast.Name):
        return node.id
    inner = _text(node.value) if isinstance(node, ast.Attribute) else None
    return f"{inner}.{node.attr}" if inner is not None and isinstance(node, ast.Attribute) else None


class _Reader(ast.NodeVisitor):
    """Reads one function with the names that are known in it."""

    def __init__(self, module: str, names: Names, found: set[str], visited: set[Any]) -> None:
        self.module, self.names, self.found, self.visited = module, names, found, visited

    def follow(self, node: ast.AST) -> None:
        state = (id(node), tuple(sorted(self.names.items())))  # trees are kept, so an id stays that of its node
        if state in self.visited:
            return
        self.visited.add(state)
        for _ in range(2):  # a name for a group, then a name for a group in it
            for assignment in (child for child in ast.walk(node) if isinstance(child, ast.Assign)):
                self._learn(assignment)
        self.generic_visit(node)

    def _learn(self, assignment: ast.Assign) -> None:
        (target, value) = assignment.targets[0], assignment.value
        several = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
        pairs = zip(target.elts, value.elts, strict=False) if several else [(target, value)]  # type: ignore[attr-defined]
        for name, chain in pairs:
            key, text = self._key(chain), _text(name)
            if key is not None and text is not None:
                self.names[text] = key

    def _key(self, node: ast.AST) -> str | None:
        text = _text(node)
        known = [name for name in self.names if text is not None and f"{text}.".startswith(f"{name}.")]
        if text is None or not known:
            return None
        longest = max(known, key=len)
        return ".".join(filter(None, (self.names[longest], text[len(longest) + 1 :])))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        key = self._key(node)
        if key is None:
            self.generic_visit(node)
        elif key and isinstance(node.ctx, ast.Load):
            self._read(key)

    def _read(self, key: str) -> None:
        cls: Any = RunConfig
        parts = key.split(".")
        for number, part in enumerate(parts):
            hints = _hints(cls) if dataclasses.is_dataclass(cls) else {}
            if part not in hints:
                owner = ".".join(parts[:number])
                accessor = inspect.getattr_static(cls, part, None)
                if isinstance(accessor, property):
                    self._follow_property(accessor, owner)
                else:
                    self.found.add(owner)  # of a plain value, such as the `value` of an enum's member
                return
            cls = hints[part].kind
        self.found.add(key)

    def _follow_property(self, accessor: property, owner: str) -> None:
        assert accessor.fget is not None
        (cls,) = [
            node
            for node in _tree(accessor.fget.__module__).body
            if isinstance(node, ast.ClassDef) and node.name == accessor.fget.__qualname__.partition(".")[0]
        ]
        (method,) = [node for node in cls.body if getattr(node, "name", None) == accessor.fget.__name__]
        _Reader(accessor.fget.__module__, {"self": owner}, self.found, self.visited).follow(method)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        text = _text(node.func)
        callee = _find(self.module, text) if text is not None else None
        if callee is None:
            return
        module, definition = callee
        is_class = isinstance(definition, ast.ClassDef)
        method = _method(definition, "__init__") if isinstance(definition, ast.ClassDef) else definition
        if method is None:
            return
        parameters = [argument.arg for argument in method.args.args][is_class:]
        values = [item for argument in node.args for item in _unpacked(argument)]
        given = [*zip(parameters, values, strict=False), *((word.arg, word.value) for word in node.keywords)]
        names = {name: key for name, value in given if name and (key := self._key(value)) is not None}
        if names:
            reader = _Reader(module, names, self.found, self.visited)
            reader.follow(method)
            own = {name: key for name, key in reader.names.items() if name.startswith("self.")}
            for other in definition.body if isinstance(definition, ast.ClassDef) and own else ():
                _Reader(module, dict(own), self.found, self.visited).follow(other)


def _method(cls: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    return next((node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == name), None)


def _unpacked(argument: ast.AST) -> list[ast.AST]:
    """An argument, or those of `*(a, b)`."""
    if isinstance(argument, ast.Starred):
        return list(argument.value.elts) if isinstance(argument.value, ast.Tuple) else []
    return [argument]
