"""The programs of a launch of `decode`: how many make x·downᵀ, how many u, how many y."""

from __future__ import annotations

import torch

from .common import cdiv, multiprocessors
from .shrink import MAX_SPLITS, MIN_BLOCKS

MIN_LOWS = 4  # programs that make x·downᵀ, where K is deep enough


def lows(tiles: int, blocks: int, device: torch.device) -> int:
    """The number of programs that make x·downᵀ together.

    y has `tiles` columns of tiles, and K is `blocks` deep. The programs' slices of K are at most
    about twice as deep as those of y's programs: there is less to read in them.
    """
    programs = 2 * multiprocessors(device)
    return max(1, min(max(MIN_LOWS, programs // tiles // 2), blocks // MIN_BLOCKS, MAX_SPLITS))


def splits(tiles: int, blocks: int, others: int, device: torch.device) -> int:
    """The number of programs that share a column tile's blocks of K.

    With the `others` of the launch there are at most two to a multiprocessor, which start at once.
    Each has at least MIN_BLOCKS. A tile that is not split needs no counter, so that there are
    always enough of them.
    """
    programs = 2 * multiprocessors(device) - others
    return max(1, min(programs // tiles, blocks // MIN_BLOCKS, MAX_SPLITS))


def rows_each(m: int, most: int, least: int, room: int) -> int:
    """The rows, of `m`, for which one program makes u where each row has its own core.

    A program reads the cores of `least` rows at a time, and waits for memory each time. So the
    rows are dealt out to as many programs as there is `room` for beside the others. The result is
    `most`, halved as often as that leaves `least` rows and the room suffices.
    """
    rows = most
    while rows > least and cdiv(m, rows // 2) <= room:
        rows //= 2
    return rows
