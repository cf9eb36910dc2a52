"""Read and write `.metadata` of distributed checkpoints, torch's description of their tensors, without torch.

It is a pickle of torch classes (torch/distributed/checkpoint/metadata.py and filesystem.py), in Megatron's
checkpoints inside a Megatron class. Reading one creates objects of no other classes and calls no functions.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

from convert.torch_save import TORCH_TYPES, Global, Rebuilt
from prune_distill.errors import InputError

MCORE_METADATA = ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata")
# The classes of torch's description of a checkpoint and the order of their fields
# (torch/distributed/checkpoint/metadata.py and filesystem.py).
DESCRIPTION: dict[str, dict[str, tuple[str, ...]]] = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata": (),
        "ChunkStorageMetadata": ("offsets", "sizes"),
        "Metadata": ("state_dict_metadata",),
        "MetadataIndex": ("fqn", "offset"),
        "StorageMeta": ("checkpoint_id", "save_id"),
        "TensorProperties": ("dtype",),
        "TensorStorageMetadata": ("properties", "size", "chunks"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo": ("relative_path", "offset", "length")},
}
# Types that torch pickles by name; they are read as that name.
TYPE_NAMES = {*(name for name, _ in TORCH_TYPES.values()), "int64", "int32", "uint8", "bool"}


class _Record:
    """Stand-in for an object of torch's description, with its constructor arguments or state as attributes.

    Importing torch would take longer than reading a description, and more memory than everything else.
    """

    FIELDS: tuple[str, ...] = ()

    def __init__(self, *values: Any) -> None:
        self.__dict__ |= dict(zip(self.FIELDS, values, strict=False))

    def __setstate__(self, state: Any) -> None:
        # The state of TensorProperties is a tuple (metadata.py, TensorProperties.__getstate__).
        self.__init__(*state) if isinstance(state, tuple) else self.__dict__.update(state)  # type: ignore[misc]


_RECORDS = {
    (module, name): type(name, (_Record,), {"FIELDS": fields, **dict.fromkeys(fields)})
    for module, classes in DESCRIPTION.items()
    for name, fields in classes.items()
}
_RECORDS[MCORE_METADATA] = _RECORDS["torch.distributed.checkpoint.metadata", "Metadata"]


class _Inert:
    """Stand-in for an object that is not needed, such as Megatron's save plans; accepts any arguments."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass


class _InertUnpickler(pickle.Unpickler):
    """Creates the objects of torch's description of a checkpoint, and inert objects for everything else.

    Attributes:
        inert: the names of the classes and functions that were replaced by inert objects.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.inert: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return _RECORDS[module, name]
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in TYPE_NAMES:
            return name
        self.inert.add(f"{module}.{name}")
        return _Inert


def read_description(path: Path) -> tuple[Any, set[str]]:
    """Read the description of a checkpoint from its pickle; also return all other names in the pickle."""
    with path.open("rb") as file:
        unpickler = _InertUnpickler(file)
        return unpickler.load(), unpickler.inert


def names_in_pickle(path: Path) -> set[str]:
    """List the classes and functions that unpickling a file would import and call, without doing so.

    Raises:
        InputError: the file is not a pickle, or damaged.
    """
    try:
        return read_description(path)[1]
    except Exception as error:  # damaged pickles raise errors of any kind
        raise InputError(f"{path} is not a complete pickle ({type(error).__name__}: {error})") from error


def torch_object(name: str, *values: Any) -> Rebuilt:
    """Describe an object of a torch class, rebuilt by its constructor on load."""
    module = next(module for module, classes in DESCRIPTION.items() if name in classes)
    return Rebuilt(Global(module, name), values)


def torch_size(extents: tuple[int, ...]) -> Rebuilt:
    return Rebuilt(Global("torch", "Size"), (extents,))
