"""What a store holds of its stored images: which they are, and rows of their arrays.

Letters: N images.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.errors import ComponentError, SelectionError
from schemas.manifest import Manifest
from schemas.recipe import CAPTURES
from schemas.store import StoreFolder
from schemas.tables import IMAGE_COLUMNS
from services.contributions import Floats
from services.reading import ArrayReader, Indices, Rows


class StoredImages:
    """The images of a store and their numbers, as far as they were recorded when it was first asked."""

    def __init__(self, folder: StoreFolder) -> None:
        self.folder = folder
        self._reader = ArrayReader(folder)

    @property
    def manifest(self) -> Manifest:
        """The store's description."""
        return self.folder.manifest

    @cached_property
    def seen(self) -> tuple[pa.Table, NDArray[np.int64]]:
        """One row per seen image, of every recorded shard, and which shard that is."""
        shards = [(batch, shard) for batch in self.folder.batch_names() for shard in self.folder.shards(batch)]
        tables = [self.folder.record(batch, shard) for batch, shard in shards]
        if not tables:
            return IMAGE_COLUMNS.empty_table(), np.empty(0, np.int64)
        numbers = np.repeat([shard for _, shard in shards], [table.num_rows for table in tables])
        return pa.concat_tables(tables, promote_options="permissive"), numbers

    @cached_property
    def stored(self) -> tuple[pa.Table, NDArray[np.int64]]:
        """One row per stored image, and its shard."""
        table, shards = self.seen
        kept = pc.is_null(table["error"])
        return table.filter(kept), shards[kept.to_numpy()]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.stored[0]["image_id"].to_pylist())}

    def chosen(self, images: Iterable[str] | None) -> Indices | None:
        """Places of images in the table of stored images; None for all.

        Raises:
            SelectionError: one of them is not stored.
        """
        if images is None:
            return None
        names = [images] if isinstance(images, str) else list(images)
        unknown = [name for name in names if name not in self._places]
        if unknown:
            raise SelectionError(f"{self.folder.path} stores no image {unknown[0]!r}; ids look like {self._example()}")
        return np.array([self._places[name] for name in names], np.intp)

    def _example(self) -> str:
        table, _ = self.stored
        return repr(table["image_id"][0].as_py()) if table.num_rows else "BATCH/NAME"

    def count(self, chosen: Indices | None) -> int:
        """How many images were chosen."""
        return int(self.stored[0].num_rows) if chosen is None else len(chosen)

    def rows(self, chosen: Indices | None) -> Rows:
        """Where the chosen images lie."""
        table, shards = self.stored
        if chosen is not None:
            table, shards = table.take(pa.array(chosen)), shards[chosen]
        return Rows(table["batch"].to_numpy(zero_copy_only=False), shards, table["row"].to_numpy())

    def read(
        self, array: str, chosen: Indices | None, selection: tuple[Indices, ...], *, as_stored: bool = False
    ) -> NDArray[Any]:
        """Rows of an array, its next dimensions narrowed by ``selection``, in float32 unless as stored.

        Raises:
            ComponentError: the store has no such array.
            DamagedStoreError: something recorded cannot be read.
        """
        if array not in self.folder.specs:
            captured = ", ".join(self.manifest.recipe.capture)
            way = (
                f": ingest with --capture {array}" if array in CAPTURES and self.manifest.model.family == "vit" else ""
            )
            raise ComponentError(f"{self.folder.path} captured {captured}, not {array}{way}")
        dtype = self.folder.specs[array].dtype if as_stored else "float32"
        return self._reader.read(array, self.rows(chosen), selection, dtype)

    def norms(self, chosen: Indices | None) -> Floats:
        """Of the representations. (N,)"""
        return np.asarray(np.linalg.norm(self.read("representation", chosen, ()), axis=1), np.float32)
