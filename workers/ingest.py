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
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from schemas.errors import BusyStoreError, PrecisionError
from schemas.layout import ArraySpec
from schemas.store import StoreFolder
from schemas.tables import SIGNIFICANT_COLUMNS, image_schema
from workers.decoding import Decoded, FileFacts, decode_image
from workers.planning import Plan
from workers.shards import ShardContent, create_batch, create_store, write_shard
from workers.staging import Staging, staging

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
        create_store(path, plan.manifest, plan.decomposition.basis, plan.fit)
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
            in_flight = writer.submit(write_shard, folder, area, plan.request.batch, shard, filled.content(plan))
            del filled  # its memory is the writer's now, and free for the next shard when that has ended
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
            window.append(decoders.submit(decode_image, plan.listing.place(row), plan.loaded.preprocess))
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
    significant: "_Significant | None"

    @classmethod
    def empty(cls, rows: range, specs: Mapping[str, ArraySpec], significant: "_Significant | None") -> "_Shard":
        arrays = {name: np.full((len(rows), *spec.shape), np.nan, spec.dtype) for name, spec in specs.items()}
        return cls(rows, arrays, [], significant)

    def put(self, positions: list[int], found: Mapping[str, torch.Tensor]) -> None:
        """Stores a batch's numbers; images whose numbers are no numbers become failures."""
        parts = {name: values.cpu().numpy() for name, values in found.items()}  # (B, ...) each
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
        if self.significant is not None:
            self.significant.put(rows + self.rows.start, {name: part[finite] for name, part in parts.items()})

    def content(self, plan: Plan) -> ShardContent:
        """All that is to be written."""
        significant = self.significant.table() if self.significant is not None else None
        return ShardContent(self.arrays, significant, self._table(plan))

    def _table(self, plan: Plan) -> pa.Table:
        """The shard's image table."""
        listing, batch = plan.listing, plan.request.batch
        names = listing.names(self.rows)
        facts = {field.name: [getattr(fact, field.name) for fact in self.facts] for field in fields(FileFacts)}
        columns = {
            "image_id": [f"{batch}/{name}" for name in names],
            "batch": [batch] * len(names),
            "row": list(self.rows),
            "source": [listing.place(row).source for row in self.rows],
            "label": listing.labels.slice(self.rows.start, len(self.rows)),
            **facts,
        }
        extra = listing.extra.slice(self.rows.start, len(self.rows))
        columns |= {name: extra[name] for name in extra.column_names}
        return pa.table(columns, schema=image_schema(extra.schema))


@dataclass(frozen=True)
class _Significant:
    """The scores of a shard that are worth keeping."""

    layers: tuple[int, ...]
    thresholds: NDArray[np.float32]  # (P, N)
    dtype: str
    found: list[pa.Table]

    def put(self, rows: NDArray[np.intp], parts: Mapping[str, NDArray[np.float32]]) -> None:
        """Takes what reaches its neuron's threshold. Norms and projections (B, P, N)."""
        norms, projections = parts["neuron_norms"], parts["neuron_projections"]
        image, layer, neuron = np.nonzero(norms >= self.thresholds)  # (rows of the table,) each
        columns: dict[str, NDArray[Any]] = {
            "layer": np.asarray(self.layers, np.int16)[layer],
            "neuron": neuron.astype(np.int32),
            "row": rows[image],
        }
        for name, values in (("norm", norms), ("projection", projections)):
            kept = values[image, layer, neuron]
            with np.errstate(over="ignore"):
                rounded = kept.astype(self.dtype)
            _check_rounding(f"neuron_{name}s", rounded[None], kept[None])
            columns[name] = rounded.astype(np.float32)
        self.found.append(pa.table(columns, schema=SIGNIFICANT_COLUMNS))

    def table(self) -> pa.Table:
        """All of them, one neuron after the other."""
        table = pa.concat_tables([SIGNIFICANT_COLUMNS.empty_table(), *self.found])
        return table.sort_by([("layer", "ascending"), ("neuron", "ascending"), ("row", "ascending")])


def _fill(
    plan: Plan, specs: Mapping[str, ArraySpec], shard: int, images: Iterator[Decoded], progress: Progress
) -> _Shard:
    recipe, significant = plan.manifest.recipe, None
    if recipe.level == "significant" and plan.fit is not None:
        layers = recipe.layers("neurons")
        thresholds = np.stack([plan.fit.thresholds(layer) for layer in layers])  # (P, N)
        significant = _Significant(layers, thresholds, recipe.dtype, [])
    filling = _Shard.empty(plan.batch.rows(shard), specs, significant)
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
