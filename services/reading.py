"""Rows of a store's arrays, shard by shard: only the chunks that are asked for, and never what is damaged."""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import DamagedStoreError, SelectionError
from schemas.store import Digest, StoreFolder
from services.contributions import Contributions, Floats

Index = int | slice | Sequence[int] | None
Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Rows:
    """Which images: one batch, shard and row for each, in the order of the result."""

    batches: NDArray[np.object_]  # (N,)
    shards: NDArray[np.int64]  # (N,)
    rows: NDArray[np.int64]  # (N,), of the batch's arrays

    def blocks(self) -> "Iterator[_Block]":
        """The images by shard, so that each shard is read once and a damaged one can be named."""
        for batch in sorted(set(self.batches)):
            for shard in np.unique(self.shards[self.batches == batch]):
                places = np.flatnonzero((self.batches == batch) & (self.shards == shard))
                order = np.argsort(self.rows[places], kind="stable")
                yield _Block(batch, int(shard), self.rows[places][order], places[order])


@dataclass(frozen=True)
class _Block:
    """The wanted images of one shard."""

    batch: str
    shard: int
    rows: NDArray[np.int64]  # of the batch's arrays, ascending
    places: Indices  # of the result


class ArrayReader:
    """Reads the arrays of one store."""

    def __init__(self, folder: StoreFolder) -> None:
        self.folder = folder
        self._known_digests: dict[tuple[str, int], dict[str, Digest]] = {}

    def read(self, array: str, rows: Rows, selection: tuple[Indices, ...], dtype: str) -> NDArray[Any]:
        """Rows of an array, its next dimensions narrowed by ``selection``. (N, ...)

        Raises:
            DamagedStoreError: a shard that is recorded is missing or changed.
        """
        shape = self.folder.specs[array].shape
        kept = (*(len(indices) for indices in selection), *shape[len(selection) :])
        found = np.empty((len(rows.rows), *kept), dtype)
        for block in rows.blocks():
            found[block.places] = self._read_block(array, block, selection)
        return found

    def _read_block(self, array: str, block: _Block, selection: tuple[Indices, ...]) -> Floats:
        spec = self.folder.specs[array]
        file = self.folder.shard_path(block.batch, spec, block.shard)
        try:
            self._check_size(array, block, file)
            source = self.folder.array(block.batch, array)
            narrow = tuple(_narrowest(indices) for indices in selection)
            runs = np.split(block.rows, np.flatnonzero(np.diff(block.rows) > int(source.chunks[0])) + 1)
            return np.concatenate([_read_run(source, run, narrow) for run in runs])
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, DamagedStoreError):
                raise
            raise DamagedStoreError(f"{file} is damaged ({error}): run 'spectrograph verify'") from error

    def _check_size(self, array: str, block: _Block, file: Path) -> None:
        """Zarr reads what is missing as the fill value and what is empty as zeros: neither must pass for numbers."""
        recorded = self._digests(block.batch, block.shard)[array].bytes
        found = file.stat().st_size if file.is_file() else None
        if found != recorded:
            what = "missing" if found is None else f"damaged ({found} bytes of {recorded})"
            raise DamagedStoreError(f"{file} is {what}: run 'spectrograph verify'")

    def _digests(self, batch: str, shard: int) -> dict[str, Digest]:
        known = self._known_digests.get((batch, shard))
        if known is None:
            known = self._known_digests[batch, shard] = self.folder.digests(batch, shard)
        return known


def _read_run(array: Any, rows: NDArray[np.int64], narrow: tuple[slice | Indices, ...]) -> Floats:
    """Rows of one array that lie so close together that the chunks between them are few."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    block: Floats = array.oindex[(slice(first, last), *narrow)] if narrow else array[first:last]
    return block if np.array_equal(rows, np.arange(first, last)) else block[rows - first]


def _narrowest(indices: Indices) -> slice | Indices:
    """A slice where one will do: it spares the store an index for every element."""
    if not len(indices):
        return slice(0, 0)
    first, last = int(indices[0]), int(indices[-1]) + 1
    return slice(first, last) if np.array_equal(indices, np.arange(first, last)) else indices


def positions(index: Index, size: int, what: str) -> Indices:
    """What an index selects among ``size``; negative numbers count from the end."""
    every = np.arange(size)
    if index is None:
        return every
    if isinstance(index, slice):
        return every[index]
    numbers = np.atleast_1d(np.asarray(index))
    if not numbers.size and numbers.ndim == 1:
        return every[:0]
    if numbers.dtype.kind != "i" or numbers.ndim != 1:
        raise SelectionError(f"{index!r} selects no {what}: give a number, a slice or a sequence of numbers")
    wrong = [int(number) for number in numbers if not -size <= number < size]
    if wrong:
        raise SelectionError(f"there is no {what} {wrong[0]}: this model has {what}s 0 to {size - 1}")
    return np.asarray(every[numbers])


def squeeze(values: Contributions, *indices: Index) -> Contributions:
    """Drops the dimensions, from the second on, that were selected by one number."""
    drop = tuple(axis for axis, index in enumerate(indices, start=1) if _is_number(index))
    return values.squeeze(drop)


def _is_number(index: Index) -> bool:
    if index is None or isinstance(index, slice | Sequence):
        return False
    try:
        operator.index(index)
    except TypeError:
        return False
    return True
