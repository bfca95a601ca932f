"""Neurons and pairs of a store: contributions, scores and directions, from coefficients or from what was kept of them.

Letters: N images, n neurons, R coefficients of a neuron, h heads, H all heads, D joint space.
"""

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.errors import ComponentError, SelectionError
from schemas.fits import Fit
from schemas.layout import coefficients_name
from schemas.tables import SIGNIFICANT_COLUMNS
from services.contributions import Contributions, Floats
from services.reading import Indices
from services.stored import StoredImages
from workers.effects import PERCENT, Effects, blocks, effects_of, factors, rows

Scores = tuple[Contributions, Contributions]  # norms and projections

_SCORES: Final = [SIGNIFICANT_COLUMNS.field(name) for name in ("norm", "projection")]
_NEURON: Final = [SIGNIFICANT_COLUMNS.field(name) for name in ("layer", "neuron")]
_KEPT: Final = ["layer", "neuron", "norm", "projection"]
_FOUND: Final = pa.schema([pa.field("image_id", pa.string()), *_NEURON, *_SCORES])
_FOUND_PAIRS: Final = pa.schema(
    [pa.field("image_id", pa.string()), _NEURON[1], pa.field("head", pa.int16(), nullable=False), *_SCORES]
)


class Neurons:
    """Reads neurons. Layers are those of `layer`; neurons and heads are positions."""

    def __init__(self, stored: StoredImages) -> None:
        self._stored = stored
        self._effects: dict[int, Effects] = {}
        self._fits: dict[str, Fit] = {}

    @cached_property
    def _basis(self) -> dict[str, NDArray[np.float32]]:
        return self._stored.folder.basis()

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose neurons are captured."""
        recipe = self._stored.manifest.recipe
        return (0,) if "pairs" in recipe.capture else recipe.layers("neurons")

    def layer(self, asked: int | None) -> int:
        """The layer that is meant.

        Raises:
            ComponentError: it is not captured.
            SelectionError: several are, and none was named.
        """
        place, layers = self._stored.folder.path, self.layers
        if not layers:
            captured = ", ".join(self._stored.manifest.recipe.capture)
            raise ComponentError(
                f"{place} captured {captured}, not neurons: ingest with --capture neurons:LAYERS, or pairs of a ResNet"
            )
        return self._one_of(layers, asked, "neurons")

    def coefficients(self, layer: int, neurons: Indices, chosen: Indices | None) -> Floats:
        """The numbers that rebuild contributions, in the plain view. (N, n, R)

        Raises:
            ComponentError: the store keeps scores only.
        """
        recipe = self._stored.manifest.recipe
        if recipe.level != "coefficients":
            raise ComponentError(
                f"{self._stored.folder.path} keeps neurons as {recipe.level}: contributions need coefficients"
            )
        array = "pairs" if self._is_resnet else coefficients_name(layer)
        read: Floats = self._stored.read(array, chosen, (neurons,))  # (N, n, ...)
        return read.reshape(*read.shape[:2], math.prod(read.shape[2:]))

    def contributions(
        self, layer: int, neurons: Indices, chosen: Indices | None, *, is_reference: bool
    ) -> Contributions:
        """What neurons add. (N, n, D)"""
        model, effects = self._stored.manifest.model, self.effects(layer)
        found = np.empty((self._stored.count(chosen), len(neurons), model.dim), np.float32)
        for block in self._blocks(effects, len(neurons)):
            numbers = self.coefficients(layer, neurons[block], chosen).swapaxes(0, 1)  # (n, N, R)
            found[:, block] = np.matmul(numbers, rows(effects, neurons[block])).swapaxes(0, 1)
        if is_reference and self._is_resnet:
            found += self._pool_bias(np.arange(model.heads)).sum(axis=0)
        elif is_reference:
            found *= self.reference_scale(chosen)[:, None, None]
        return found

    def direct(
        self, layer: int | None, neurons: Indices, chosen: Indices | None, *, is_reference: bool
    ) -> Contributions:
        """What neurons of a transformer add through no other part of it. (N, n, D)"""
        recipe, place = self._stored.manifest.recipe, self._stored.folder.path
        layers = recipe.layers("direct")
        if not layers:
            captured = ", ".join(recipe.capture)
            raise ComponentError(f"{place} captured {captured}, not direct: ingest with --capture direct:LAYERS")
        layer = self._one_of(layers, layer, "direct effects")
        at = np.array([layers.index(layer)])
        numbers = self._stored.read("direct", chosen, (at, neurons))[:, 0, :, None]  # (N, n, 1)
        outputs = self._basis["neuron_outputs"][recipe.output_layers.index(layer)][neurons]  # (n, W)
        found = numbers * (outputs @ self._basis["last_matrix"])  # (N, n, D)
        return np.asarray(found * self.reference_scale(chosen)[:, None, None] if is_reference else found, np.float32)

    def fit(self, name: str | None) -> Fit:
        """The fit that is meant: scores that were kept have but one; of others the latest, unless named.

        Raises:
            SelectionError: there is no such fit, or another one made the scores.
        """
        made_by = self._stored.manifest.recipe.fit
        if made_by is not None and name not in (None, made_by):
            raise SelectionError(f"the scores in {self._stored.folder.path} were made by the fit {made_by}, not {name}")
        wanted = name if name is not None else made_by or self._stored.folder.fit_description().name
        if wanted not in self._fits:
            self._fits[wanted] = self._stored.folder.fit(wanted)
        return self._fits[wanted]

    def scores(self, layer: int, neurons: Indices, chosen: Indices | None, fit: Fit) -> Scores:
        """Norms of what neurons add beyond their mean, and projections of that on their directions. (N, n) each"""
        level = self._stored.manifest.recipe.level
        if level == "coefficients":
            return self._computed(layer, neurons, chosen, fit)
        if level == "significant":
            return self._kept(layer, neurons, chosen)
        at = np.array([self.layers.index(layer)])
        norms = self._stored.read("neuron_norms", chosen, (at, neurons))[:, 0]  # (N, n)
        return norms, self._stored.read("neuron_projections", chosen, (at, neurons))[:, 0]

    def directions(self, layer: int, neurons: Indices, fit: Fit) -> Contributions:
        """Unit vectors; of a neuron that never changes, zeros. (n, D)"""
        effects = self.effects(layer)
        found = np.empty((len(neurons), self._stored.manifest.model.dim), np.float32)
        for block in self._blocks(effects, len(neurons)):
            some = neurons[block]
            found[block] = np.matmul(fit.directions(layer)[some][:, None], rows(effects, some))[:, 0]
        return found

    def significant(self, layer: int, neurons: Indices, fit: Fit) -> pa.Table:
        """One row per image and neuron over its threshold, by neuron and falling norm."""
        images, recipe = self._stored.stored[0]["image_id"], self._stored.manifest.recipe
        order = [("neuron", "ascending"), ("norm", "descending")]
        tables = [_FOUND.empty_table()]
        if recipe.level == "significant":
            for places, table in self._recorded(layer, neurons, None):
                columns = {
                    "image_id": images.take(pa.array(places)),
                    **dict(zip(_KEPT, table.select(_KEPT), strict=True)),
                }
                tables.append(pa.table(columns, schema=_FOUND))
            return pa.concat_tables(tables).sort_by(order)
        thresholds = fit.thresholds(layer)
        if recipe.level == "scores":  # what was rounded is compared with what is rounded alike, and never with zero
            thresholds = np.maximum(thresholds.astype(recipe.dtype), np.finfo(recipe.dtype).smallest_subnormal)
        for block in blocks(len(neurons), 8 * max(1, self._stored.count(None))):
            some = neurons[block]
            norms, projections = self.scores(layer, some, None, fit)  # (N, n)
            image, at = np.nonzero(norms >= thresholds[some])
            columns = {
                "image_id": images.take(pa.array(image)),
                "layer": np.full(len(at), layer, np.int16),
                "neuron": some[at].astype(np.int32),
                "norm": norms[image, at],
                "projection": projections[image, at],
            }
            tables.append(pa.table(columns, schema=_FOUND))
        return pa.concat_tables(tables).sort_by(order)

    def significant_pairs(self, neurons: Indices, heads: Indices, fit: Fit) -> pa.Table:
        """One row per image and pair over its threshold, by pair and falling norm."""
        images = self._stored.stored[0]["image_id"]
        thresholds = fit.arrays["pair_thresholds"][np.ix_(neurons, heads)]  # (n, h)
        tables = [_FOUND_PAIRS.empty_table()]
        for block in blocks(len(neurons), 8 * len(heads) * max(1, self._stored.count(None))):
            norms, projections = self.pair_scores(neurons[block], heads, None, fit)  # (N, n, h)
            image, at, head = np.nonzero(norms >= thresholds[block])
            columns = {
                "image_id": images.take(pa.array(image)),
                "neuron": neurons[block][at].astype(np.int32),
                "head": heads[head].astype(np.int16),
                "norm": norms[image, at, head],
                "projection": projections[image, at, head],
            }
            tables.append(pa.table(columns, schema=_FOUND_PAIRS))
        order = [("neuron", "ascending"), ("head", "ascending"), ("norm", "descending")]
        return pa.concat_tables(tables).sort_by(order)

    def pairs(self, neurons: Indices, heads: Indices, chosen: Indices | None, *, is_reference: bool) -> Contributions:
        """What pairs add. (N, n, h, D)"""
        numbers = self._pair_numbers(neurons, heads, chosen)  # (N, n, h)
        found = numbers[..., None] * self._pair_rows(neurons, heads)  # (N, n, h, D)
        return np.asarray(found + self._pool_bias(heads) if is_reference else found, np.float32)

    def pair_scores(self, neurons: Indices, heads: Indices, chosen: Indices | None, fit: Fit) -> Scores:
        """Norms of what pairs add beyond their mean, and projections of that on their directions. (N, n, h) each"""
        numbers = self._pair_numbers(neurons, heads, chosen)
        arrays, chosen_pairs = fit.arrays, np.ix_(neurons, heads)
        lengths = np.linalg.norm(self._basis["pair_reads"][chosen_pairs], axis=2)  # (n, h)
        centred = (numbers - arrays["pair_means"][chosen_pairs]) * lengths  # (N, n, h)
        return np.abs(centred), centred * arrays["pair_signs"][chosen_pairs]

    def pair_directions(self, neurons: Indices, heads: Indices, fit: Fit) -> Contributions:
        """Unit vectors. (n, h, D)"""
        found = self._pair_rows(neurons, heads)  # (n, h, D)
        lengths = np.linalg.norm(found, axis=2, keepdims=True)
        signs = fit.arrays["pair_signs"][np.ix_(neurons, heads)]
        return np.asarray(found / np.maximum(lengths, np.finfo(np.float32).tiny) * signs[..., None], np.float32)

    def pool_constant(self, images: int) -> Contributions:
        """What a ResNet adds to every image alike. (N, D)"""
        total = self._basis["value_biases"].sum(axis=0) + self._basis["output_bias"]  # (D,)
        return np.tile(total, (images, 1))

    def effects(self, layer: int) -> Effects:
        """The static half of a layer's neurons."""
        if layer not in self._effects:
            manifest = self._stored.manifest
            self._effects[layer] = effects_of(manifest.model, manifest.recipe, self._basis, layer)
        return self._effects[layer]

    def reference_scale(self, chosen: Indices | None) -> Floats:
        """What turns coefficients into those of the references' view, constants aside. (N,)"""
        if self._is_resnet:
            return np.ones(self._stored.count(chosen), np.float32)
        return np.asarray(PERCENT / self._stored.norms(chosen), np.float32)

    def need_pairs(self) -> None:
        """Makes sure that the store holds pairs.

        Raises:
            ComponentError: it is of a transformer.
        """
        if not self._is_resnet:
            raise ComponentError(f"{self._stored.folder.path} is of a transformer, which has no pairs: ask for neurons")

    @property
    def _is_resnet(self) -> bool:
        return self._stored.manifest.model.family == "resnet"

    def _one_of(self, layers: tuple[int, ...], asked: int | None, what: str) -> int:
        place, known = self._stored.folder.path, ", ".join(map(str, layers))
        if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int | np.integer)):
            raise SelectionError(f"{asked!r} is no layer: give one number of {known}")
        if asked is None and len(layers) > 1:
            raise SelectionError(f"{place} holds {what} of layers {known}: name one")
        if asked is not None and asked not in layers:
            raise ComponentError(f"{place} holds no {what} of layer {asked}; it holds those of {known}")
        return layers[0] if asked is None else int(asked)

    def _blocks(self, effects: Effects, neurons: int) -> Iterator[slice]:
        """Some neurons at a time, so that their rows take a bounded memory."""
        return blocks(neurons, 8 * len(effects.heads) * self._stored.manifest.model.dim)

    def _computed(self, layer: int, neurons: Indices, chosen: Indices | None, fit: Fit) -> Scores:
        images = self._stored.count(chosen)
        norms, projections = np.empty((2, images, len(neurons)), np.float32)
        effects = self.effects(layer)
        count, scale = len(effects.heads), self.reference_scale(chosen)[:, None, None]  # (N, 1, 1)
        for block in blocks(len(neurons), 8 * max(images, count) * count):
            some = neurons[block]
            factor = factors(effects, some).astype(np.float32)  # (n, R, R)
            inside = np.matmul(fit.directions(layer)[some][:, None], factor).swapaxes(1, 2)  # (n, R, 1)
            centred = self.coefficients(layer, some, chosen) * scale - fit.means(layer)[some]  # (N, n, R)
            turned = np.matmul(centred.swapaxes(0, 1), factor)  # (n, N, R)
            norms[:, block] = np.linalg.norm(turned, axis=2).T
            projections[:, block] = np.matmul(turned, inside)[:, :, 0].T
        return norms, projections

    def _kept(self, layer: int, neurons: Indices, chosen: Indices | None) -> Scores:
        """The significant scores among NaN."""
        every = np.arange(self._stored.count(None)) if chosen is None else chosen
        images, back = np.unique(every, return_inverse=True)
        columns, back_columns = np.unique(neurons, return_inverse=True)
        found = np.full((2, len(images), len(columns)), np.nan, np.float32)
        for places, table in self._recorded(layer, columns, images):
            at = np.searchsorted(columns, table["neuron"].to_numpy())
            for values, name in zip(found, ("norm", "projection"), strict=True):
                values[places, at] = table[name].to_numpy()
        norms, projections = found[:, back][:, :, back_columns]
        return norms, projections

    def _recorded(self, layer: int, neurons: Indices, images: Indices | None) -> Iterator[tuple[Indices, pa.Table]]:
        """The significant scores of some images, all different, shard by shard: places among the images, and rows."""
        for block in self._stored.rows(images).blocks():
            table = self._stored.folder.significant(block.batch, block.shard, layer, neurons.tolist())
            rows_kept = table["row"].to_numpy()
            at = np.searchsorted(block.rows, rows_kept)
            known = at < len(block.rows)
            known[known] = block.rows[at[known]] == rows_kept[known]
            yield block.places[at[known]], table.filter(pa.array(known))

    def _pair_numbers(self, neurons: Indices, heads: Indices, chosen: Indices | None) -> Floats:
        return self._stored.read("pairs", chosen, (neurons, heads))

    def _pair_rows(self, neurons: Indices, heads: Indices) -> Contributions:
        reads = self._basis["pair_reads"][np.ix_(neurons, heads)].swapaxes(0, 1)  # (h, n, R)
        found = np.matmul(reads, self._basis["heads"][0, heads]).swapaxes(0, 1)  # (n, h, D)
        return np.asarray(found, np.float32)

    def _pool_bias(self, heads: Indices) -> Contributions:
        """What each pair of some heads gets of the constant, in the references' view. (h, D)"""
        model = self._stored.manifest.model
        shared = self._basis["value_biases"][heads] + self._basis["output_bias"] / model.heads
        return np.asarray(shared / model.neurons, np.float32)
