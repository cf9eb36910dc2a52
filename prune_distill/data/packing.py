"""Pack documents into sequences of a fixed length: only whole documents, as many as fit."""

from __future__ import annotations

import numpy as np


def pack(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Assign documents to sequences: the longest first, each to the sequence with the least room that still holds it.

    Best-fit decreasing needs at most 11/9 of the fewest sequences (Johnson, 1974). Documents of the same length keep
    their order, so that the order of the documents decides which of them share a sequence.

    Args:
        lengths: tokens of each document, `[documents]`, from 1 to `capacity`.

    Returns:
        The number of each document's sequence, `[documents]` int64.
    """
    sequences = np.empty(len(lengths), dtype=np.int64)
    by_room: list[list[int]] = [[] for _ in range(capacity)]
    rooms = 0  # bit r: some sequence has room for exactly r more tokens
    count = 0
    for place in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[place])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            number, room, count = count, capacity, count + 1
        sequences[place] = number
        if room > length:
            by_room[room - length].append(number)
            rooms |= 1 << (room - length)
    return sequences


def cut(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents that are longer than a sequence.

    Returns:
        For each piece: its document, its first token and its length, `[pieces]` int64 each.
    """
    counts = -(-lengths // capacity)
    documents = np.repeat(np.arange(len(lengths)), counts)
    firsts = (np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)) * capacity
    return documents, firsts, np.minimum(capacity, lengths[documents] - firsts)
