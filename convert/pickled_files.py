"""Read `pytorch_model*.bin` files (state dicts written by `torch.save`) without running code in them.

Such a file is a zip of `data.pkl`, which describes the tensors, and a record per storage. Only the description is
unpickled, and only with the classes of tensors.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.stored import Rows, Span, StoredTensor
from convert.torch_save import TORCH_TYPES
from prune_distill.errors import InputError
from prune_distill.model.hf_weights import ITEM_BYTES, PICKLED, read_index
from prune_distill.nemo.saved_records import Record, read_record, record_begin

INDEX = "pytorch_model.bin.index.json"
_STORAGES = {storage: ours for ours, (_, storage) in TORCH_TYPES.items()}
_STORAGES |= {"LongStorage": "I64", "IntStorage": "I32", "ByteStorage": "U8"}  # buffers next to weights


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """Locate the tensors of a folder of `.bin` files.

    Raises:
        InputError: a file is missing, damaged, in the format of torch before 1.6, or contains more than tensors.
    """
    index = folder / INDEX
    if index.exists():
        names = sorted(set(read_index(index).values()))
    else:
        names = sorted(path.name for path in folder.glob(PICKLED))
    missing = [name for name in names if not (folder / name).exists()]
    if missing or not names:
        raise InputError(f"{folder} has no {', '.join(missing) or 'pytorch_model.bin'}; download it")
    tensors: dict[str, StoredTensor] = {}
    for file in names:
        found = read_file(folder / file)
        if repeated := sorted(tensors.keys() & found.keys()):
            raise InputError(f"{folder}: {repeated[0]} is in {file} and in another file; download the model again")
        tensors |= found
    return tensors


def read_file(path: Path) -> dict[str, StoredTensor]:
    """Locate the tensors of one file."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as saved:
            described = next(name for name in saved.namelist() if name.endswith("/data.pkl"))
            records = {info.filename: info for info in saved.infolist()}
            state = _StateDict(io.BytesIO(read_record(saved, described))).load()
            stored = {
                name: Record(path, record_begin(file, info), info.file_size, info.CRC, name)
                for name, info in records.items()
            }
    except InputError as fault:
        raise InputError(f"{path} {fault}") from fault
    except Exception as error:  # damaged zips and pickles raise errors of any kind
        raise InputError(
            f"{path} is not a complete file of torch.save ({error!r}); download it again, or as safetensors"
        ) from error
    if not isinstance(state, dict):
        raise InputError(f"{path} does not contain a dict of tensors; save the model as safetensors")
    root = described.removesuffix("data.pkl")
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(tensor, _Described):
            raise InputError(f"{path}: {name} is not a tensor; save the model as safetensors")
        if not tensor.is_contiguous:
            raise InputError(f"{path}: {name} is not contiguous; save the model as safetensors")
        record = records.get(f"{root}data/{tensor.storage}")
        if record is None or record.compress_type != zipfile.ZIP_STORED or record.file_size < tensor.end:
            raise InputError(f"{path} does not contain {name}; download it again, or as safetensors")
        tensors[name] = tensor.stored(name, stored[record.filename])
    return tensors


@dataclass(frozen=True)
class _Described:
    """A tensor of a state dict: the record of its storage; offset and strides in elements."""

    storage: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def end(self) -> int:
        """Offset in bytes of the tensor's end in its storage."""
        return (self.offset + math.prod(self.shape)) * ITEM_BYTES[self.dtype]

    @property
    def is_contiguous(self) -> bool:
        expected = (math.prod(self.shape[dimension + 1 :]) for dimension in range(len(self.shape)))
        return all(
            stride == contiguous
            for stride, contiguous, extent in zip(self.strides, expected, self.shape, strict=True)
            if extent > 1
        )

    def stored(self, name: str, record: Record) -> StoredTensor:
        item = ITEM_BYTES[self.dtype]
        shape = self.shape or (1,)
        span = Span(record.file, record.begin + self.offset * item, math.prod(shape[1:]) * item, record)
        return StoredTensor(name, self.dtype, shape, (Rows(shape[0], (span,)),))


class _StateDict(pickle.Unpickler):
    """Reads a state dict as descriptions of its tensors."""

    def persistent_load(self, identity: Any) -> tuple[str, str]:
        _, storage_class, key, *_ = identity
        return str(key), str(storage_class)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _described
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise InputError(f"names {module}.{name}, which could be code and which no tensor needs")


def _described(storage: tuple[str, str], offset: int, shape: Any, strides: Any, *_: Any) -> _Described:
    return _Described(storage[0], storage[1], offset, tuple(shape), tuple(strides))
