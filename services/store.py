"""Reading a store: contributions of chosen components and images, from the chunks that hold them and no others.

Letters: N images, L layers, H heads, T tokens, R coefficients of a head, D joint space.
"""

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.components import Component, Constant, Embedding, Head, Mlp, parse
from schemas.errors import ComponentError, SelectionError
from schemas.manifest import Manifest
from schemas.store import StoreFolder
from schemas.tables import IMAGE_COLUMNS
from services.contributions import Basis, Contributions, Floats, View, shared_out
from services.reading import ArrayReader, Index, Indices, Rows, positions, squeeze


def open_store(path: str | os.PathLike[str]) -> "Store":
    """The store at ``path``, as far as it is written: a store that is still growing shows its finished shards.

    Raises:
        NotAStoreError: there is none.
        DamagedStoreError: it cannot be read.
    """
    return Store(StoreFolder.open(Path(path)))


class Store:
    """Contributions and facts of the images in a store.

    Every method that returns arrays has one row per image: those of ``images``, a sequence of image ids, in its order;
    or, by default, all stored images, in the order of ``store.images()``. ``layer`` and ``head`` take a number, a slice
    or a sequence; a number drops the dimension, ``None`` stands for all. `services.contributions` explains the views.
    """

    def __init__(self, folder: StoreFolder) -> None:
        self.folder = folder
        self._reader = ArrayReader(folder)

    def __repr__(self) -> str:
        return f"<Store {str(self.folder.path)!r}: {self._stored[0].num_rows} images>"

    @property
    def manifest(self) -> Manifest:
        """The model, the recipe and the versions behind the store."""
        return self.folder.manifest

    def batches(self) -> list[str]:
        """The names of the batches."""
        return self.folder.batch_names()

    def images(self) -> pa.Table:
        """One row per stored image: ids, where it came from, labels and the source's own columns."""
        return self._stored[0].drop_columns(["error"])

    def failures(self) -> pa.Table:
        """One row per image that could not be stored, with the reason in ``error``."""
        table, _ = self._seen
        return table.filter(pc.is_valid(table["error"]))

    def components(self) -> list[Component]:
        """Every component whose contribution is stored, in the order in which the model applies them."""
        model, arrays = self.manifest.model, self.folder.specs
        found: list[Component] = [Embedding()] if "embedding" in arrays else []
        for layer in range(model.layers):
            if "heads" in arrays:
                found += [Head(layer, head) for head in range(model.heads)]
            if "mlps" in arrays:
                found.append(Mlp(layer))
        return [*found, Constant()]

    def representation(self, *, images: Iterable[str] | None = None) -> Contributions:
        """The image encoder's output before it is normalised. (N, D)"""
        return self._read("representation", self._chosen(images), ())

    def heads(
        self, *, layer: Index = None, head: Index = None, images: Iterable[str] | None = None, view: View = "plain"
    ) -> Contributions:
        """Contributions of attention heads. (N, L, H, D)

        Raises:
            SelectionError: no such layer, head or image.
            ComponentError: the store did not capture heads.
            DamagedStoreError: something recorded cannot be read.
        """
        layers, heads = self._layers(layer), self._heads(head)
        chosen = self._chosen(images)
        plain = self._basis.heads_of(self._read("heads", chosen, (layers, heads)), layers, heads)
        if _is_reference(view):
            share = self._basis.layer_share(self._constants(chosen), layers)[:, :, None]
            plain = shared_out(plain, share, self.manifest.model.heads, self._norms(chosen))
        return squeeze(plain, layer, head)

    def mlps(self, *, layer: Index = None, images: Iterable[str] | None = None, view: View = "plain") -> Contributions:
        """Contributions of MLPs. (N, L, D); raises as `heads` does."""
        chosen = self._chosen(images)
        plain = self._read("mlps", chosen, (self._layers(layer),))
        return squeeze(self._with_norm_share(plain, chosen, view), layer)

    def embedding(self, *, images: Iterable[str] | None = None, view: View = "plain") -> Contributions:
        """What enters the first block. (N, D); raises as `heads` does."""
        chosen = self._chosen(images)
        return self._with_norm_share(self._read("embedding", chosen, ()), chosen, view)

    def constant(self, *, images: Iterable[str] | None = None) -> Contributions:
        """What is left: the sum of all contributions in the plain view and this is the representation. (N, D)"""
        return self._basis.constant(self._constants(self._chosen(images)))

    def cls_to_cls(
        self, *, layer: Index = None, images: Iterable[str] | None = None, view: View = "plain"
    ) -> Contributions:
        """What the class token adds to itself, all heads of a layer together. (N, L, D); raises as `heads` does."""
        layers, chosen = self._layers(layer), self._chosen(images)
        plain = self._read("cls_to_cls", chosen, (layers,))
        if _is_reference(view):
            share = self._basis.layer_share(self._constants(chosen), layers)
            plain = shared_out(plain, share, self.manifest.model.tokens, self._norms(chosen))
        return squeeze(plain, layer)

    def tokens(
        self, *, layer: Index = None, head: Index = None, images: Iterable[str] | None = None, view: View = "plain"
    ) -> Contributions:
        """What each head adds from each token, the class token first. (N, L, H, T, D); raises as `heads` does."""
        layers, heads = self._layers(layer), self._heads(head)
        model, chosen = self.manifest.model, self._chosen(images)
        plain = self._basis.heads_of(self._read("tokens", chosen, (layers, heads)), layers, heads)
        if _is_reference(view):
            share = self._basis.layer_share(self._constants(chosen), layers)[:, :, None, None]
            plain = shared_out(plain, share, model.heads * model.tokens, self._norms(chosen))
        return squeeze(plain, layer, head)

    def contribution(
        self, component: Component | str, *, images: Iterable[str] | None = None, view: View = "plain"
    ) -> Contributions:
        """The contribution of one component, by name: ``store.contribution("head:5.2")``. (N, D)

        Raises:
            ComponentError: the name means nothing, or the store does not hold such a component.
        """
        match parse(component) if isinstance(component, str) else component:
            case Head(layer, head):
                return self.heads(layer=layer, head=head, images=images, view=view)
            case Mlp(layer):
                return self.mlps(layer=layer, images=images, view=view)
            case Embedding():
                return self.embedding(images=images, view=view)
            case Constant() if _is_reference(view):
                raise ComponentError("the references' view shares the constant out: ask for it with view='plain'")
            case Constant():
                return self.constant(images=images)
            case other:
                raise ComponentError(
                    f"{self.folder.path} does not hold {other}; it holds heads, MLPs and the embedding"
                )

    def coefficients(self, array: str, *, images: Iterable[str] | None = None) -> Floats:
        """One array as it is stored, all of it: ``heads`` (N, L, H, R), ``mlps`` (N, L, D) and so on."""
        return self._read(array, self._chosen(images), (), as_stored=True)

    # What follows reads.

    @cached_property
    def _seen(self) -> tuple[pa.Table, NDArray[np.int64]]:
        """One row per seen image, of every recorded shard, and which shard that is."""
        shards = [(batch, shard) for batch in self.batches() for shard in self.folder.shards(batch)]
        tables = [self.folder.record(batch, shard) for batch, shard in shards]
        if not tables:
            return IMAGE_COLUMNS.empty_table(), np.empty(0, np.int64)
        numbers = np.repeat([shard for _, shard in shards], [table.num_rows for table in tables])
        return pa.concat_tables(tables, promote_options="permissive"), numbers

    @cached_property
    def _stored(self) -> tuple[pa.Table, NDArray[np.int64]]:
        """One row per stored image, and its shard."""
        table, shards = self._seen
        kept = pc.is_null(table["error"])
        return table.filter(kept), shards[kept.to_numpy()]

    @cached_property
    def _basis(self) -> Basis:
        return Basis(**self.folder.basis())

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self._stored[0]["image_id"].to_pylist())}

    def _chosen(self, images: Iterable[str] | None) -> Indices | None:
        """Places of images in the table of stored images."""
        if images is None:
            return None
        names = [images] if isinstance(images, str) else list(images)
        unknown = [name for name in names if name not in self._places]
        if unknown:
            raise SelectionError(f"{self.folder.path} stores no image {unknown[0]!r}; ids look like {self._example()}")
        return np.array([self._places[name] for name in names], np.intp)

    def _example(self) -> str:
        table, _ = self._stored
        return repr(table["image_id"][0].as_py()) if table.num_rows else "BATCH/NAME"

    def _layers(self, index: Index) -> Indices:
        return positions(index, self.manifest.model.layers, "layer")

    def _heads(self, index: Index) -> Indices:
        return positions(index, self.manifest.model.heads, "head")

    def _constants(self, chosen: Indices | None) -> Floats:
        return self._read("constants", chosen, ())

    def _norms(self, chosen: Indices | None) -> Floats:
        return np.asarray(np.linalg.norm(self._read("representation", chosen, ()), axis=1), np.float32)

    def _with_norm_share(self, plain: Contributions, chosen: Indices | None, view: View) -> Contributions:
        if not _is_reference(view):
            return plain
        share = self._basis.norm_share(self._constants(chosen))
        return shared_out(plain, share[:, None] if plain.ndim == 3 else share, 1, self._norms(chosen))

    def _read(
        self,
        array: str,
        chosen: Indices | None,
        selection: tuple[Indices, ...],
        *,
        as_stored: bool = False,
    ) -> NDArray[Any]:
        """Rows of an array, its next dimensions narrowed by ``selection``, in float32 unless as stored."""
        if array not in self.folder.specs:
            captured = ", ".join(self.manifest.recipe.capture)
            raise ComponentError(f"{self.folder.path} captured {captured}, not {array}: ingest with --capture {array}")
        table, shards = self._stored
        if chosen is not None:
            table, shards = table.take(pa.array(chosen)), shards[chosen]
        rows = Rows(table["batch"].to_numpy(zero_copy_only=False), shards, table["row"].to_numpy())
        dtype = self.folder.specs[array].dtype if as_stored else "float32"
        return self._reader.read(array, rows, selection, dtype)


def _is_reference(view: View) -> bool:
    if view not in ("plain", "reference"):
        raise SelectionError(f"{view!r} is no view: choose 'plain' or 'reference'")
    return view == "reference"
