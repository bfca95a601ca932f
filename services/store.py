"""Reading a store: contributions of chosen components and images, from the chunks that hold them and no others.

Letters: N images, L layers, H heads, T tokens, R coefficients of a head, D joint space.
"""

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.components import Component, Constant, Embedding, Head, Mlp, Neuron, Pair, parse
from schemas.errors import ComponentError, SelectionError
from schemas.fits import Fit
from schemas.manifest import Manifest
from schemas.store import StoreFolder
from services.contributions import Basis, Contributions, Floats, View, shared_out
from services.neurons import Neurons
from services.reading import Index, Indices, positions, squeeze
from services.stored import StoredImages

What = Literal["contributions", "norms", "projections"]
Effect = Literal["second-order", "direct"]


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
        self._stored = StoredImages(folder)
        self._neurons = Neurons(self._stored)

    def __repr__(self) -> str:
        return f"<Store {str(self.folder.path)!r}: {self._stored.count(None)} images>"

    @property
    def manifest(self) -> Manifest:
        """The model, the recipe and the versions behind the store."""
        return self.folder.manifest

    def batches(self) -> list[str]:
        """The names of the batches."""
        return self.folder.batch_names()

    def images(self) -> pa.Table:
        """One row per stored image: ids, where it came from, labels and the source's own columns."""
        return self._stored.stored[0].drop_columns(["error"])

    def failures(self) -> pa.Table:
        """One row per image that could not be stored, with the reason in ``error``."""
        table, _ = self._stored.seen
        return table.filter(pc.is_valid(table["error"]))

    def components(self) -> list[Component]:
        """The stored components that sum to the representation, in the order in which the model applies them.

        A transformer's neurons are not among them: what they add is part of what MLPs and later heads add.
        """
        model, arrays = self.manifest.model, self.folder.specs
        if "pairs" in arrays:
            return [*(Pair(*pair) for pair in np.ndindex(model.neurons, model.heads)), Constant()]
        found: list[Component] = [Embedding()] if "embedding" in arrays else []
        for layer in range(model.layers):
            if "heads" in arrays:
                found += [Head(layer, head) for head in range(model.heads)]
            if "mlps" in arrays:
                found.append(Mlp(layer))
        return [*found, Constant()]

    def representation(self, *, images: Iterable[str] | None = None) -> Contributions:
        """The image encoder's output before it is normalised. (N, D)"""
        return self._stored.read("representation", self._stored.chosen(images), ())

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
        chosen = self._stored.chosen(images)
        plain = self._basis.heads_of(self._stored.read("heads", chosen, (layers, heads)), layers, heads)
        if _is_reference(view):
            share = self._basis.layer_share(self._constants(chosen), layers)[:, :, None]
            plain = shared_out(plain, share, self.manifest.model.heads, self._stored.norms(chosen))
        return squeeze(plain, layer, head)

    def mlps(self, *, layer: Index = None, images: Iterable[str] | None = None, view: View = "plain") -> Contributions:
        """Contributions of MLPs. (N, L, D); raises as `heads` does."""
        chosen = self._stored.chosen(images)
        plain = self._stored.read("mlps", chosen, (self._layers(layer),))
        return squeeze(self._with_norm_share(plain, chosen, view), layer)

    def embedding(self, *, images: Iterable[str] | None = None, view: View = "plain") -> Contributions:
        """What enters the first block. (N, D); raises as `heads` does."""
        chosen = self._stored.chosen(images)
        return self._with_norm_share(self._stored.read("embedding", chosen, ()), chosen, view)

    def constant(self, *, images: Iterable[str] | None = None) -> Contributions:
        """What is left: the sum of all contributions in the plain view and this is the representation. (N, D)"""
        chosen = self._stored.chosen(images)
        if self.manifest.model.family == "resnet":
            return self._neurons.pool_constant(self._stored.count(chosen))
        return self._basis.constant(self._constants(chosen))

    def cls_to_cls(
        self, *, layer: Index = None, images: Iterable[str] | None = None, view: View = "plain"
    ) -> Contributions:
        """What the class token adds to itself, all heads of a layer together. (N, L, D); raises as `heads` does."""
        layers, chosen = self._layers(layer), self._stored.chosen(images)
        plain = self._stored.read("cls_to_cls", chosen, (layers,))
        if _is_reference(view):
            share = self._basis.layer_share(self._constants(chosen), layers)
            plain = shared_out(plain, share, self.manifest.model.tokens, self._stored.norms(chosen))
        return squeeze(plain, layer)

    def tokens(
        self, *, layer: Index = None, head: Index = None, images: Iterable[str] | None = None, view: View = "plain"
    ) -> Contributions:
        """What each head adds from each token, the class token first. (N, L, H, T, D); raises as `heads` does."""
        layers, heads = self._layers(layer), self._heads(head)
        model, chosen = self.manifest.model, self._stored.chosen(images)
        plain = self._basis.heads_of(self._stored.read("tokens", chosen, (layers, heads)), layers, heads)
        if _is_reference(view):
            share = self._basis.layer_share(self._constants(chosen), layers)[:, :, None, None]
            plain = shared_out(plain, share, model.heads * model.tokens, self._stored.norms(chosen))
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
            case Neuron(layer, index):
                return self.neurons(layer, index, images=images, view=view)
            case Pair(neuron, head):
                return self.pairs(neuron=neuron, head=head, images=images, view=view)
            case Constant() if _is_reference(view):
                raise ComponentError("the references' view shares the constant out: ask for it with view='plain'")
            case Constant():
                return self.constant(images=images)

    def neurons(
        self,
        layer: int | None = None,
        neuron: Index = None,
        *,
        what: What = "contributions",
        effect: Effect = "second-order",
        images: Iterable[str] | None = None,
        view: View = "plain",
        fit: str | None = None,
    ) -> Contributions:
        """What neurons of one layer's MLP add through later heads, or directly; of a ResNet, the sums of its pairs.

        The second-order contributions of a transformer's neurons are the references' up to one vector per image, common
        to all neurons of a layer: their even share of biases and means. In the references' view they are in percent of
        the representation's norm.

        Args:
            layer: of the MLP; may be left out where only one is captured, and of a ResNet.
            neuron: which of its neurons.
            what: ``contributions`` (N, n, D); or, with a fit and always in the references' view, ``norms`` of what they
                are beyond their mean, or ``projections`` of that on the neurons' directions, (N, n). Where only
                significant scores are kept, the others are NaN. Of a ResNet they are absolute, as in the papers.
            effect: ``second-order``, or ``direct``, through no other part of the model.
            images: which images, in which order.
            view: of contributions.
            fit: by name; by default, the fit that made the scores, or the latest.

        Raises:
            SelectionError: no such layer, neuron, image or fit.
            ComponentError: the store did not capture what is asked for.
            DamagedStoreError: something recorded cannot be read.
        """
        if effect not in get_args(Effect):
            raise SelectionError(f"{effect!r} is no effect: choose {' or '.join(get_args(Effect))}")
        model, chosen = self.manifest.model, self._stored.chosen(images)
        which, is_reference = positions(neuron, model.neurons, "neuron"), _is_reference(view)
        if _is_score(what):
            if effect == "direct":
                raise ComponentError("a fit is of second-order effects: ask for direct ones as contributions")
            norms, projections = self._neurons.scores(self._neurons.layer(layer), which, chosen, self._neurons.fit(fit))
            return squeeze(norms if what == "norms" else projections, neuron)
        if effect == "direct":
            found = self._neurons.direct(layer, which, chosen, is_reference=is_reference)
        else:
            found = self._neurons.contributions(self._neurons.layer(layer), which, chosen, is_reference=is_reference)
        return squeeze(found, neuron)

    def pairs(
        self,
        *,
        neuron: Index = None,
        head: Index = None,
        what: What = "contributions",
        images: Iterable[str] | None = None,
        view: View = "plain",
        fit: str | None = None,
    ) -> Contributions:
        """What each head of a ResNet's attention pool adds from each neuron: (N, n, h, D), or scores (N, n, h).

        Arguments and errors are those of `neurons`; the references' view shares the biases out and divides by nothing.
        """
        self._neurons.need_pairs()
        model, chosen = self.manifest.model, self._stored.chosen(images)
        neurons, heads = positions(neuron, model.neurons, "neuron"), self._heads(head)
        is_reference = _is_reference(view)
        if _is_score(what):
            norms, projections = self._neurons.pair_scores(neurons, heads, chosen, self._neurons.fit(fit))
            return squeeze(norms if what == "norms" else projections, neuron, head)
        found = self._neurons.pairs(neurons, heads, chosen, is_reference=is_reference)
        return squeeze(found, neuron, head)

    def directions(
        self, layer: int | None = None, neuron: Index = None, *, head: Index = None, fit: str | None = None
    ) -> Contributions:
        """Unit vectors along which neurons contribute where they are significant. (n, D), or of pairs (n, h, D)

        A neuron's is the first principal component of its ``top_k`` largest contributions, a pair's a row of weights;
        most of the largest contributions point along it. ``head``, a number or ``slice(None)``, asks for pairs. Raises
        as `neurons` does.
        """
        which, at = positions(neuron, self.manifest.model.neurons, "neuron"), self._neurons.layer(layer)
        if head is None:
            found = self._neurons.directions(at, which, self._neurons.fit(fit))[None]  # (1, n, D)
            return np.asarray(squeeze(found, neuron)[0])
        self._neurons.need_pairs()
        found = self._neurons.pair_directions(which, self._heads(head), self._neurons.fit(fit))[None]  # (1, n, h, D)
        return np.asarray(squeeze(found, neuron, head)[0])

    def significant(
        self, layer: int | None = None, neuron: Index = None, *, head: Index = None, fit: str | None = None
    ) -> pa.Table:
        """The images in which neurons are significant: image_id, layer, neuron, norm, projection.

        Sorted by neuron, the largest norm of each first.

        ``head``, a number or ``slice(None)``, asks for pairs: head in place of layer. Raises as `neurons` does.
        """
        which, at = positions(neuron, self.manifest.model.neurons, "neuron"), self._neurons.layer(layer)
        if head is None:
            return self._neurons.significant(at, which, self._neurons.fit(fit))
        self._neurons.need_pairs()
        return self._neurons.significant_pairs(which, self._heads(head), self._neurons.fit(fit))

    def fits(self) -> list[str]:
        """The names of the fits, the latest last."""
        return self.folder.fit_names()

    def fit(self, name: str | None = None) -> Fit:
        """A fit: means, thresholds, directions and the variance explained; the latest unless named.

        Raises:
            SelectionError: there is no such fit.
        """
        return self._neurons.fit(name)

    def coefficients(self, array: str, *, images: Iterable[str] | None = None) -> Floats:
        """One array as it is stored, all of it: ``heads`` (N, L, H, R), ``mlps`` (N, L, D) and so on."""
        return self._stored.read(array, self._stored.chosen(images), (), as_stored=True)

    # What follows reads.

    @cached_property
    def _basis(self) -> Basis:
        if self.manifest.model.family != "vit":
            raise ComponentError(f"{self.folder.path} is of a ResNet: it holds pairs, and neurons as their sums")
        static = self.folder.basis()
        return Basis(static["heads"], static["norm_terms"], static["bias_terms"])

    def _layers(self, index: Index) -> Indices:
        return positions(index, self.manifest.model.layers, "layer")

    def _heads(self, index: Index) -> Indices:
        return positions(index, self.manifest.model.heads, "head")

    def _constants(self, chosen: Indices | None) -> Floats:
        return self._stored.read("constants", chosen, ())

    def _with_norm_share(self, plain: Contributions, chosen: Indices | None, view: View) -> Contributions:
        if not _is_reference(view):
            return plain
        share = self._basis.norm_share(self._constants(chosen))
        return shared_out(plain, share[:, None] if plain.ndim == 3 else share, 1, self._stored.norms(chosen))


def _is_score(what: What) -> bool:
    if what not in get_args(What):
        raise SelectionError(f"{what!r} is nothing to ask of a neuron: choose {', '.join(get_args(What))}")
    return what != "contributions"


def _is_reference(view: View) -> bool:
    if view not in ("plain", "reference"):
        raise SelectionError(f"{view!r} is no view: choose 'plain' or 'reference'")
    return view == "reference"
