"""Whole documents in sequences of a fixed length."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from prune_distill.data.packing import cut, pack


def fewest(lengths: list[int], capacity: int) -> int:
    """Return the fewest sequences, by trying all orders of the documents."""

    def next_fit(order: tuple[int, ...]) -> int:
        count, room = 0, 0
        for length in order:
            if length > room:
                count, room = count + 1, capacity
            room -= length
        return count

    return min(map(next_fit, itertools.permutations(lengths)))


@pytest.mark.parametrize("seed", range(20))
def test_sequences_hold_all_documents_and_are_few(seed: int) -> None:
    random = np.random.default_rng(seed)
    few = random.integers(1, 11, 7)
    sequences = pack(few, 10)
    assert np.bincount(sequences, few).max() <= 10
    assert sorted(set(sequences.tolist())) == list(range(sequences.max() + 1))
    assert sequences.max() + 1 <= 11 / 9 * fewest(few.tolist(), 10) + 6 / 9  # Dosa, 2007: tight
    many = random.integers(1, 1025, 3000)
    filled = np.bincount(pack(many, 1024), many)
    assert filled.max() <= 1024
    # Half of the documents are longer than half a sequence. Seen: 1.004 to 1.022.
    assert len(filled) <= 1.03 * many.sum() / 1024


def test_a_document_goes_where_it_fits_best() -> None:
    # 7 and 6 open two sequences of 10; 4 fits the second exactly, and 3 then the first.
    assert pack(np.array([3, 4, 6, 7]), 10).tolist() == [0, 1, 1, 0]
    assert pack(np.array([], dtype=np.int64), 10).tolist() == []


def test_long_documents_are_cut() -> None:
    documents, firsts, lengths = cut(np.array([4, 9, 10, 21]), 10)
    assert documents.tolist() == [0, 1, 2, 3, 3, 3]
    assert firsts.tolist() == [0, 0, 0, 0, 10, 20]
    assert lengths.tolist() == [4, 9, 10, 10, 10, 1]
