"""What a fit of neurons is: means, thresholds and directions, learnt from a sample of images.

A neuron's contribution is ``coefficients @ rows`` (`workers.effects`), so its mean and its direction are kept as
coefficients, too. All of a fit is in the references' view. Letters: N neurons, R coefficients of a neuron, H heads.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from schemas.layout import StaticSpec
from schemas.manifest import KEY, Sizes, typed
from schemas.recipe import Recipe

_NAME_LENGTH: Final = 12


@dataclass(frozen=True, repr=False)
class Fit:
    """A fit, with or without its arrays."""

    model: str  # fingerprint of its weights
    sample: str  # SHA-256 of the ids and contents of the images, and of how they were encoded
    images: int
    top_k: int
    created: str  # ISO 8601, UTC
    layers: tuple[int, ...]
    neurons: int
    coefficients: tuple[int, ...]  # numbers per neuron, by layer
    heads: int  # of the pairs; 0 where the model has none
    arrays: Mapping[str, NDArray[np.float32]] = field(default_factory=dict, repr=False, compare=False)

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        return f"<Fit {self.name}: of {self.images} images, the {self.top_k} largest of each neuron; layers {layers}>"

    @property
    def name(self) -> str:
        """What the fit was made of, in twelve letters: the same sample gives the same name."""
        told = [self.model, self.sample, self.images, self.top_k, list(self.layers)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:_NAME_LENGTH]

    def specs(self) -> list[StaticSpec]:
        """The arrays.

        By layer: ``means_L`` and ``directions_L`` (N, R), coefficients of the mean contribution and of the unit vector
        of the first principal component; for all layers, ``thresholds``, the smallest of the ``top_k`` largest centred
        norms, and ``explained``, the share of the first component in those, (layers, N). For a ResNet's pairs,
        ``pair_means``, ``pair_thresholds`` and ``pair_signs`` (N, H).
        """
        found = [
            StaticSpec(f"{what}_{layer}", ("neuron", f"coefficient_{layer}"), (self.neurons, count))
            for layer, count in zip(self.layers, self.coefficients, strict=True)
            for what in ("means", "directions")
        ]
        shape = (len(self.layers), self.neurons)
        found += [StaticSpec(name, ("neuron_layer", "neuron"), shape) for name in ("thresholds", "explained")]
        if self.heads:
            names = ("pair_means", "pair_thresholds", "pair_signs")
            found += [StaticSpec(name, ("neuron", "head"), (self.neurons, self.heads)) for name in names]
        return found

    def lacks(self, recipe: Recipe, sizes: Sizes) -> str | None:
        """What of a capture this fit cannot score, in words; nothing if it can."""
        missing = [layer for layer in recipe.layers("neurons") if layer not in self.layers]
        if missing:
            return f"no layer {missing[0]}: it has {', '.join(map(str, self.layers))}"
        for layer, count in zip(self.layers, self.coefficients, strict=True):
            rows = sizes.heads if sizes.family == "resnet" else (sizes.layers - 1 - layer) * sizes.heads
            if (self.neurons, count) != (sizes.neurons, rows):
                return f"other sizes than the model: {self.neurons} neurons of {count} coefficients in layer {layer}"
        return None

    def means(self, layer: int) -> NDArray[np.float32]:
        """Coefficients of the mean contributions of one layer's neurons. (N, R)"""
        return self.arrays[f"means_{layer}"]

    def directions(self, layer: int) -> NDArray[np.float32]:
        """Coefficients of the directions of one layer's neurons. (N, R)"""
        return self.arrays[f"directions_{layer}"]

    def thresholds(self, layer: int) -> NDArray[np.float32]:
        """The centred norms from which on one layer's neurons are significant. (N,)"""
        return np.asarray(self.arrays["thresholds"][self.layers.index(layer)])

    def explained(self, layer: int) -> NDArray[np.float32]:
        """The share of the first component in the largest contributions of one layer's neurons. (N,)"""
        return np.asarray(self.arrays["explained"][self.layers.index(layer)])

    def with_arrays(self, arrays: Mapping[str, NDArray[np.float32]]) -> Self:
        """The same with its arrays."""
        return replace(self, arrays=arrays)

    def to_json(self) -> dict[str, Any]:
        """The attributes of the fit's group."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "arrays"}
        values |= {"layers": list(self.layers), "coefficients": list(self.coefficients)}
        return {KEY: values}

    @classmethod
    def from_json(cls, attributes: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; a ``ValueError`` where something is missing or of no sense."""
        values = typed(cls, attributes.get(KEY), without=("layers", "coefficients", "heads", "arrays"))
        for name in ("layers", "coefficients", "heads"):
            found = attributes[KEY].get(name)
            numbers = found if isinstance(found, list) else [found]
            if isinstance(found, list) == (name == "heads") or not all(_is_count(number) for number in numbers):
                raise ValueError(f"{name!r} is {found!r}")
            values[name] = found if name == "heads" else tuple(found)
        layers = values["layers"]
        if not layers or len(layers) != len(values["coefficients"]) or list(layers) != sorted(set(layers)):
            raise ValueError(f"'layers' is {layers!r}")
        return cls(**values)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
