"""The main job: images in, shards of coefficients out.

Decoding (threads), the model (this thread) and writing (one thread) overlap. What is held in memory is a window of
decoded images, the shard being filled and the shard being written, however many images there are.
"""

import os
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from schemas.errors import BusyStoreError, PrecisionError
from schemas.layout import ArraySpec
from schemas.store import StoreFolder
from schemas.tables import image_schema
from workers.decoding import Decoded, FileFacts, decode_file
from workers.planning import Plan
from workers.shards import BasisArray, create_batch, create_store, write_shard
from workers.sources import as_text
from workers.staging import Staging, staging
from workers.vit import Basis

_WINDOW_BATCHES: Final = 3
_MOST_LOST: Final = 1e-3  # of the norm of what is rounded; half a unit in the last place of float16 is half of it


@dataclass(frozen=True)
class Outcome:
    """What the whole batch came to, earlier runs included: ``seen = stored + failed``."""

    seen: int
    stored: int
    failed: int
    written_bytes: int  # in this run


class Progress(Protocol):
    """Hears how an ingest gets on."""

    def encoded(self, images: int, failed: int) -> None:
        """So many more images were taken, so many of which failed."""
        ...

    def wrote(self, size: int) -> None:
        """One more shard is recorded, of so many bytes."""
        ...


def run_ingest(plan: Plan, progress: Progress) -> Outcome:
    """Writes the pending shards of a plan. Stopped at any moment, a new plan of the same request completes the rest.

    Raises:
        StoreError: the disk refused, or another process is at work on the batch.
        PrecisionError: a number does not fit the store's dtype.
    """
    name, path = plan.request.batch, plan.request.store
    if plan.is_new_store:
        create_store(path, plan.manifest, _basis_arrays(plan.decomposition.basis))
    folder = StoreFolder.open(path)
    written = _write(plan, folder, progress) if plan.pending else 0
    shards = folder.shards(name)
    seen = sum(len(plan.batch.rows(shard)) for shard in shards)
    failed = sum(folder.record(name, shard)["error"].drop_null().length() for shard in shards)
    return Outcome(seen, seen - failed, failed, written)


def _write(plan: Plan, folder: StoreFolder, progress: Progress) -> int:
    """Writes the pending shards as the one writer of the batch, and returns their bytes."""
    name = plan.request.batch
    with staging(folder.path, name) as area:
        if plan.is_new_batch:
            create_batch(folder, area, name, plan.batch)
        elif set(folder.shards(name)) & set(plan.pending):
            raise BusyStoreError(f"another process wrote to batch {name!r} of {folder.path} meanwhile: run it again")
        return _write_pending(plan, folder, area, progress)


def _write_pending(plan: Plan, folder: StoreFolder, area: Staging, progress: Progress) -> int:
    written = 0
    in_flight: Future[int] | None = None
    with ThreadPoolExecutor(1, "write") as writer, closing(_decoded(plan)) as images:
        for shard in plan.pending:
            filled = _fill(plan, folder.specs, shard, images, progress)
            if in_flight is not None:
                written += _finish(in_flight, progress)
            write = partial(write_shard, arrays=filled.arrays, images=filled.table(plan))
            in_flight = writer.submit(write, folder, area, plan.request.batch, shard)
        if in_flight is not None:
            written += _finish(in_flight, progress)
    return written


def _finish(in_flight: Future[int], progress: Progress) -> int:
    size = in_flight.result()
    progress.wrote(size)
    return size


def _decoded(plan: Plan) -> Generator[Decoded, None, None]:
    """The images of all pending shards in order, decoded ahead of their use by a bounded window."""
    rows = (row for shard in plan.pending for row in plan.batch.rows(shard))
    window: deque[Future[Decoded]] = deque()
    decoders = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "decode")
    try:
        for row in rows:
            window.append(decoders.submit(decode_file, plan.listing.path(row), plan.loaded.preprocess))
            if len(window) > _WINDOW_BATCHES * plan.request.batch_size:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        decoders.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _Shard:
    """A shard being filled; what is not filled stays NaN."""

    rows: range
    arrays: dict[str, NDArray[np.floating[Any]]]
    facts: list[FileFacts]

    @classmethod
    def empty(cls, rows: range, specs: Mapping[str, ArraySpec]) -> "_Shard":
        arrays = {name: np.full((len(rows), *spec.shape), np.nan, spec.dtype) for name, spec in specs.items()}
        return cls(rows, arrays, [])

    def put(self, positions: list[int], found: Mapping[str, torch.Tensor]) -> None:
        """Stores a batch's numbers; images whose numbers are no numbers become failures."""
        parts = {name: found[name].cpu().numpy() for name in self.arrays}  # (B, ...) each
        finite = np.all(
            [np.isfinite(part).reshape(len(part), -1).all(axis=1) for part in parts.values()], axis=0
        )  # (B,)
        for position in np.asarray(positions)[~finite]:
            self.facts[position] = replace(self.facts[position], error="the model's output is not finite")
        rows = np.asarray(positions)[finite]
        for name, array in self.arrays.items():
            with np.errstate(over="ignore"):
                array[rows] = parts[name][finite]
            _check_rounding(name, array[rows], parts[name][finite])

    def table(self, plan: Plan) -> pa.Table:
        """The shard's image table."""
        listing, batch = plan.listing, plan.request.batch
        names = [listing.name(row) for row in self.rows]
        facts = {field.name: [getattr(fact, field.name) for fact in self.facts] for field in fields(FileFacts)}
        columns = {
            "image_id": [f"{batch}/{name}" for name in names],
            "batch": [batch] * len(names),
            "row": list(self.rows),
            "source": [as_text(listing.path(row)) for row in self.rows],
            "label": listing.labels[self.rows.start : self.rows.stop],
            **facts,
        }
        extra = listing.extra.slice(self.rows.start, len(self.rows))
        columns |= {name: extra[name] for name in extra.column_names}
        return pa.table(columns, schema=image_schema(extra.schema))


def _fill(
    plan: Plan, specs: Mapping[str, ArraySpec], shard: int, images: Iterator[Decoded], progress: Progress
) -> _Shard:
    filling = _Shard.empty(plan.batch.rows(shard), specs)
    size = plan.request.batch_size
    for start in range(0, len(filling.rows), size):
        positions = range(start, min(start + size, len(filling.rows)))
        decoded = [next(images) for _ in positions]
        filling.facts.extend(image.facts for image in decoded)
        usable = {at: image.pixels for at, image in zip(positions, decoded, strict=True) if image.pixels is not None}
        if usable:
            pixels = torch.stack(list(usable.values())).to(plan.loaded.device)  # (B, 3, height, width)
            filling.put(list(usable), plan.decomposition.encode(pixels))
        progress.encoded(len(positions), sum(filling.facts[at].error is not None for at in positions))
    return filling


def _check_rounding(name: str, stored: NDArray[np.floating[Any]], values: NDArray[np.floating[Any]]) -> None:
    """A number past the largest of its type becomes infinite, and one below the smallest vanishes: both are said."""
    if stored.dtype == values.dtype or not stored.size:
        return
    rows = values.reshape(len(values), -1)
    lost = np.linalg.norm(stored.astype(values.dtype).reshape(rows.shape) - rows, axis=1)
    if not (lost <= _MOST_LOST * np.linalg.norm(rows, axis=1)).all():
        largest = float(np.abs(values).max())
        why = (
            f"reach {largest:.3g}, which overflows"
            if np.isinf(stored).any()
            else f"are at most {largest:.3g}, too small for"
        )
        raise PrecisionError(f"{name} {why} {stored.dtype}: use another store with --dtype float32")


def _basis_arrays(basis: Basis) -> dict[str, BasisArray]:
    return {
        "heads": BasisArray(basis.heads, ("layer", "head", "coefficient", "dim")),
        "norm_terms": BasisArray(basis.norm_terms, ("term", "dim")),
        "bias_terms": BasisArray(basis.bias_terms, ("layer", "term", "dim")),
    }
