"""Read and write the `context/` of a NeMo checkpoint, from which NeMo rebuilds the model, without NeMo.

`io.json` is a Fiddle configuration in JSON (fiddle/_src/experimental/serialization.py) of the calls that build the
model, which `nemo.lightning.io.load_context` loads. `model.yaml` contains the same for people and for NeMo's
exporters (nemo/export/trt_llm/nemo_ckpt_loader/nemo_file.py:482). `tokenizer/` holds the tokenizer's files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prune_distill.errors import InputError
from prune_distill.pipeline.names import CONTEXT, TOKENIZER

# Path of the root object. NeMo finds the parts of the model by their paths.
ROOT = "<root>"


@dataclass(frozen=True)
class Reference:
    """A class, function or constant, by its module and name; it is not imported here."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """`function(**arguments)`, called when the context is loaded."""

    function: Reference
    arguments: dict[str, object]


# An object of `io.json`. A file from elsewhere may contain anything, so every access may fail.
Node = dict[str, Any]


@dataclass(frozen=True)
class ModelRecord:
    """The model that a context describes: its NeMo config class and the arguments of the config."""

    config_class: str
    config: Node


def model_call(model: Reference, config: Call) -> Call:
    """Return what NeMo's importer records: the model, and a trainer on the CPU."""
    tokenizer = Call(
        Reference("nemo.collections.common.tokenizers.huggingface.auto_tokenizer", "AutoTokenizer"),
        {"pretrained_model_name": TOKENIZER},  # relative to context/
    )
    # The default optimizer of GPTModel (nemo/collections/llm/gpt/model/base.py).
    optimizer = Call(
        Reference("nemo.lightning.pytorch.optim.megatron", "MegatronOptimizerModule"),
        {
            "config": Call(
                Reference("megatron.core.optimizer.optimizer_config", "OptimizerConfig"),
                {"lr": 1e-4, "use_distributed_optimizer": True},
            )
        },
    )
    strategy = Call(
        Reference("nemo.lightning.pytorch.strategies.megatron_strategy", "MegatronStrategy"),
        {"ckpt_save_optimizer": False},
    )
    trainer = Call(
        Reference("nemo.lightning.pytorch.trainer", "Trainer"),
        {"accelerator": "cpu", "devices": 1, "strategy": strategy},
    )
    return Call(
        Reference("nemo.lightning.io.pl", "TrainerContext"),
        {
            "model": Call(model, {"config": config, "optim": optimizer, "tokenizer": tokenizer}),
            "trainer": trainer,
            "extra": {},
        },
    )


def write_context(folder: Path, call: Call) -> None:
    """Write `io.json` and `model.yaml` into the existing folder `folder`."""
    (folder / "io.json").write_text(json.dumps(_Fiddle().serialize(call)))
    (folder / "model.yaml").write_text(yaml.safe_dump(_plain(call.arguments["model"])))


def read_context(checkpoint: Path) -> ModelRecord:
    """Read the model that a checkpoint's context describes, without importing or calling anything.

    Raises:
        InputError: there is no context, or it does not describe a model.
    """
    path = checkpoint / CONTEXT / "io.json"
    if not path.is_file():
        raise InputError(f"{checkpoint} is not a NeMo checkpoint (it has no context/io.json)")
    content = _read(path)
    try:
        objects: Node = content["objects"]
        model = next(value for value in objects.values() if f"{ROOT}.model.config" in value.get("paths", ()))
        config_class = objects[model["metadata"]["key"]]["items"][0][1]
        values = {
            name: value["value"] for name, value in _arguments(objects, model).items() if value.get("type") == "leaf"
        }
        return ModelRecord(f"{config_class['module']}.{config_class['name']}", values)
    except (*_STRUCTURE_ERRORS, StopIteration) as error:
        raise InputError(f"{path} does not describe a model ({type(error).__name__}: {error})") from error


def references(checkpoint: Path) -> set[str]:
    """List every class and function that loading a context would import or call, as `module.name`.

    Raises:
        InputError: there is no context that could be read.
    """
    # NeMo imports any object's type without a check (nemo/lightning/io/mixin.py:846).
    nodes = (node for node in _nodes(_read(checkpoint / CONTEXT / "io.json")) if "module" in node)
    return {f"{node['module']}.{node.get('name')}" for node in nodes}


def trusts_remote_code(checkpoint: Path) -> bool:
    """Return whether a context asks transformers to run code of a model repository.

    Raises:
        InputError: there is no context that could be read.
    """
    path = checkpoint / CONTEXT / "io.json"
    content = _read(path)
    try:
        values = (
            _arguments(content["objects"], node).get("trust_remote_code")
            for node in _nodes(content)
            if "items" in node and _type(node) not in _PLAIN and not _is_pickled(node)
        )
        return any(_leaf(value) not in (None, False) for value in values)
    except _STRUCTURE_ERRORS as error:
        raise _format_error(path, error) from error


def pickled_files(checkpoint: Path) -> set[str]:
    """List the files next to `io.json` that loading it unpickles: objects that Fiddle could not describe.

    Raises:
        InputError: there is no context that could be read.
    """
    path = checkpoint / CONTEXT / "io.json"
    nodes = _nodes(_read(path))
    try:
        return {str(_leaf(node["items"][0][1])) for node in nodes if _is_pickled(node)}
    except _STRUCTURE_ERRORS as error:
        raise _format_error(path, error) from error


# Raised by reading JSON of an unexpected structure.
_STRUCTURE_ERRORS = (ValueError, KeyError, TypeError, AttributeError, IndexError)
_CALLS = ("fiddle._src.config.Config", "fiddle._src.config.Partial")
_DESCRIPTION = "fiddle._src.config.BuildableTraverserMetadata"
_PLAIN = ("builtins.dict", "builtins.list", "builtins.tuple", _DESCRIPTION)


def _format_error(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is not in NeMo's format ({type(error).__name__}: {error})")


def _type(node: Node) -> str:
    return f"{node['type']['module']}.{node['type']['name']}"


def _is_pickled(node: Node) -> bool:
    """Return whether an object is NeMo's reference to a pickled file (nemo/lightning/io/mixin.py:679)."""
    return len(node.get("items") or ()) == 1 and _type(node) not in (*_PLAIN, *_CALLS)


def _leaf(value: Any) -> Any:
    """Unwrap a plain value, which Fiddle accepts with or without a leaf object; other values are unchanged."""
    return value["value"] if isinstance(value, dict) and value.get("type") == "leaf" else value


def _arguments(objects: Node, call: Node) -> Node:
    """Return a call's arguments. Like Fiddle, match names and values by position and ignore the items' labels."""
    described = objects[call["metadata"]["key"]]
    names = objects[described["items"][1][1]["key"]]
    if (_type(described), _type(names)) != (_DESCRIPTION, "builtins.tuple"):
        raise ValueError(f"argument names in a {_type(names)} of a {_type(described)}")
    return {name: value for (_, name), (_, value) in zip(names["items"], call["items"], strict=True)}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error})") from error


def _nodes(content: Any) -> Iterator[Node]:
    """Yield all objects of a JSON document."""
    nodes = [content]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            yield node
            nodes.extend(node.values())
        elif isinstance(node, list):
            nodes.extend(node)


def _plain(value: Any) -> Any:
    """Convert a value to the format of `model.yaml`: calls have `_target_`, references also `_call_: false`."""
    if isinstance(value, Call):
        target = {"_target_": f"{value.function.module}.{value.function.name}"}
        return target | {name: _plain(argument) for name, argument in value.arguments.items()}
    if isinstance(value, Reference):
        return {"_target_": f"{value.module}.{value.name}", "_call_": False}
    return value


class _Fiddle:
    """Serializes calls to Fiddle's JSON: a table of objects that refer to each other by key."""

    def __init__(self) -> None:
        self._objects: dict[str, object] = {}
        self._numbers: Counter[str] = Counter()

    def serialize(self, call: Call) -> dict[str, object]:
        root = self._value(call, ROOT)
        counts = dict.fromkeys(self._objects, 1)
        return {"root": root, "objects": self._objects, "refcounts": counts, "version": "0.0.1"}

    def _value(self, value: Any, path: str) -> dict[str, object]:
        if isinstance(value, Call):
            return self._call(value, path)
        if isinstance(value, Reference):
            return {**_pyref(value), "paths": [path]}
        if isinstance(value, list):
            items = [[f"Index(index={i})", self._value(item, f"{path}[{i}]")] for i, item in enumerate(value)]
            return self._add("list", {"type": _builtin("list"), "items": items, "metadata": None, "paths": [path]})
        if value == {}:
            return self._empty_dict()
        return {"type": "leaf", "value": value, "paths": [path]}

    def _call(self, call: Call, path: str) -> dict[str, object]:
        arguments = [
            [f"Attr(name='{name}')", self._value(value, f"{path}.{name}")] for name, value in call.arguments.items()
        ]
        names = [[f"Index(index={i})", name] for i, name in enumerate(call.arguments)]
        traverser = Reference("fiddle._src.config", "BuildableTraverserMetadata")
        metadata = self._add(
            "buildable_traverser_metadata",
            {
                "type": _pyref(traverser),
                "items": [
                    ["Attr(name='fn_or_cls')", _pyref(call.function)],
                    [
                        "Attr(name='argument_names')",
                        self._add("tuple", {"type": _builtin("tuple"), "items": names, "metadata": None}),
                    ],
                    ["Attr(name='argument_tags')", self._empty_dict()],
                    ["Attr(name='argument_history')", self._empty_dict()],
                ],
                "metadata": _pyref(traverser),
            },
        )
        return self._add(
            call.function.name.lower(),
            {
                "type": _pyref(Reference("fiddle._src.config", "Config")),
                "items": arguments,
                "metadata": metadata,
                "paths": [path],
            },
        )

    def _empty_dict(self) -> dict[str, object]:
        nothing: dict[str, object] = {"type": _builtin("tuple"), "items": [], "metadata": None}
        return self._add("dict", {"type": _builtin("dict"), "items": [], "metadata": nothing})

    def _add(self, kind: str, value: dict[str, object]) -> dict[str, object]:
        self._numbers[kind] += 1
        key = f"{kind}_{self._numbers[kind]}"
        self._objects[key] = value
        return {"type": "ref", "key": key}


def _pyref(reference: Reference) -> dict[str, object]:
    return {"type": "pyref", "module": reference.module, "name": reference.name}


def _builtin(name: str) -> dict[str, object]:
    return _pyref(Reference("builtins", name))
