"""Parquet files as rows of plain values.

`readers` imports this module only for parquet files: pyarrow takes 33 MB in every worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from prune_distill.errors import InputError

ROWS_PER_BATCH = 256


def read_rows(path: str, row_groups: range, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of some row groups, one mapping per row.

    Args:
        columns: the columns to read, those that exist; strings of the first one are yielded as bytes.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            found = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=list(row_groups), columns=found):
                yield from _strings_to_bytes(batch, columns[0]).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(" ".join(str(error).split())) from error


def _strings_to_bytes(batch: Any, name: str) -> Any:
    """Cast a column of strings to bytes, so that an invalid string costs one row and not the file."""
    if name not in batch.schema.names:
        return batch
    column = batch.column(name)
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    types = pyarrow.types
    if types.is_string(column.type) or types.is_large_string(column.type) or types.is_string_view(column.type):
        column = column.cast(pyarrow.large_binary())
    return batch.set_column(batch.schema.get_field_index(name), name, column)


def read_metadata(path: str) -> Any:
    """Read the metadata of a file, which includes its schema.

    Raises:
        InputError: the file is damaged.
    """
    try:
        return pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{path} is not a complete parquet file ({' '.join(str(error).split())}); download it again, or remove it"
            " from the data section"
        ) from error
