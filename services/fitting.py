"""Learning from a sample what neurons do on average, from where on they matter, and in which direction they then point.

As in the papers: a neuron's importance threshold is the smallest of its ``top_k`` largest centred norms, its direction
the first right singular vector of those contributions, with the sign that most of them share. No contribution is built:
with ``F`` of `workers.effects.factors`, ``c @ F`` has the norms and angles of ``c @ rows`` in a few dimensions.

Letters: S images of the sample, k the largest of them, n neurons, R coefficients of a neuron, H heads.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.errors import ComponentError, PlanError
from schemas.fits import Fit
from services.neurons import Neurons
from services.reading import Indices
from services.stored import StoredImages
from workers.effects import blocks, factors, small_matrices

# Thresholds lie below the image that makes them by what rounding may move it, so that it is found again; and a neuron
# that changes by no more than rounding is significant nowhere.
_MARGIN: Final = {"float16": 2.0**-10, "float32": 1e-5}
_SEED: Final = 0  # of the sample: the same images every time

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class NeuronFit:
    """What is learnt of some neurons."""

    means: Doubles  # (n, R)
    directions: Doubles  # (n, R), coefficients of unit vectors
    thresholds: Doubles  # (n,)
    explained: Doubles  # (n,)


def fit_neurons(coefficients: Doubles, factor: Doubles, top_k: int, margin: float = 0.0) -> NeuronFit:
    """Fits neurons.

    Args:
        coefficients: of the sample, (n, S, R).
        factor: of the neurons' rows, (n, R, R).
        top_k: how many of the largest contributions count, at most S.
        margin: by how much rounding may move a norm, relative to it.
    """
    means = coefficients.mean(axis=1)  # (n, R)
    centred = coefficients - means[:, None]  # (n, S, R)
    turned = centred @ factor  # (n, S, R)
    norms = np.linalg.norm(turned, axis=2)  # (n, S)
    top = np.argpartition(norms, -top_k, axis=1)[:, -top_k:, None]  # (n, k, 1)
    largest, parts = np.take_along_axis(turned, top, 1), np.take_along_axis(centred, top, 1)  # (n, k, R) each
    values, vectors = np.linalg.eigh(largest.swapaxes(1, 2) @ largest)  # (n, R), (n, R, R): ascending
    first, total = values[:, -1], np.maximum(values, 0).sum(axis=1)  # (n,) each
    along = (largest @ vectors[:, :, -1:])[:, :, 0]  # (n, k)
    lengths = np.linalg.norm(np.matmul(means[:, None], factor)[:, 0], axis=1)  # (n,), of the mean contributions
    smallest = np.maximum(margin * lengths, np.finfo(np.float32).tiny)  # (n,)
    some = norms.max(axis=1) > smallest  # a neuron that never changes has no direction
    # The combination of contributions that is the singular vector, as the same combination of coefficients: no inverse.
    weights = np.divide(along, first[:, None], where=some[:, None], out=np.zeros_like(along))  # (n, k)
    directions = np.matmul(weights[:, None], parts)[:, 0]  # (n, R)
    return NeuronFit(
        means=means,
        directions=directions * _majority(along)[:, None],
        thresholds=np.maximum(np.take_along_axis(norms, top[:, :, 0], 1).min(axis=1) * (1 - margin), smallest),
        explained=np.divide(first, total, where=some, out=np.zeros_like(first)),
    )


def fit_store(stored: StoredImages, sample: int, top_k: int, fitted: Callable[[int], None] = lambda _: None) -> Fit:
    """Fits every captured neuron, and the pairs of a ResNet, on up to ``sample`` stored images.

    Args:
        stored: a store that holds coefficients.
        sample: how many images; chosen at random, always the same.
        top_k: how many of the largest contributions of each neuron count.
        fitted: hears of so many more neurons.

    Raises:
        PlanError: the sample is too small.
        ComponentError: the store holds no coefficients of neurons or pairs.
    """
    neurons, manifest = Neurons(stored), stored.manifest
    neurons.layer(neurons.layers[0] if neurons.layers else None)
    if manifest.recipe.level != "coefficients":
        raise ComponentError(
            f"{stored.folder.path} keeps neurons as {manifest.recipe.level}, by its fit {manifest.recipe.fit}: "
            "fit a store that keeps coefficients"
        )
    chosen = _sample(stored, sample, top_k)
    images, margin = len(chosen), _MARGIN[manifest.recipe.dtype]
    scale = neurons.reference_scale(chosen)[:, None, None]  # (S, 1, 1)
    arrays: dict[str, NDArray[np.float32]] = {}
    single: list[Doubles] = []
    explained: list[Doubles] = []
    counts = []
    for layer in neurons.layers:
        effects = neurons.effects(layer)
        counts.append(len(effects.heads))
        parts = []
        for block in blocks(len(effects), 8 * max(images, counts[-1]) * counts[-1]):
            some = np.arange(block.start, block.stop)
            read = neurons.coefficients(layer, some, chosen).astype(np.float64) * scale  # (S, n, R)
            numbers = np.ascontiguousarray(read.swapaxes(0, 1))  # (n, S, R)
            with small_matrices():
                parts.append(fit_neurons(numbers, factors(effects, some), top_k, margin))
            fitted(len(some))
        arrays[f"means_{layer}"] = np.concatenate([part.means for part in parts]).astype(np.float32)
        arrays[f"directions_{layer}"] = np.concatenate([part.directions for part in parts]).astype(np.float32)
        single.append(np.concatenate([part.thresholds for part in parts]))
        explained.append(np.concatenate([part.explained for part in parts]))
    arrays["thresholds"] = np.stack(single).astype(np.float32)
    arrays["explained"] = np.stack(explained).astype(np.float32)
    model = manifest.model
    heads = model.heads if model.family == "resnet" else 0
    if heads:
        arrays |= _fit_pairs(neurons, chosen, arrays["means_0"], top_k, margin)
    return Fit(
        model=model.fingerprint,
        sample=_digest(stored, chosen),
        images=images,
        top_k=top_k,
        created=datetime.now(UTC).isoformat(timespec="microseconds"),
        layers=neurons.layers,
        neurons=model.neurons,
        coefficients=tuple(counts),
        heads=heads,
        arrays=arrays,
    )


def _fit_pairs(
    neurons: Neurons, chosen: Indices, means: NDArray[np.float32], top_k: int, margin: float
) -> dict[str, NDArray[np.float32]]:
    """Thresholds and signs of pairs, whose directions are rows of weights."""
    effects = neurons.effects(0)
    thresholds, signs = np.empty_like(means), np.empty_like(means)  # (n, H) each
    for block in blocks(len(effects), 8 * len(chosen) * means.shape[1]):
        some = np.arange(block.start, block.stop)
        centred = neurons.coefficients(0, some, chosen) - means[some]  # (S, n, H)
        top = np.argpartition(np.abs(centred), -top_k, axis=0)[-top_k:]  # (k, n, H)
        largest = np.take_along_axis(centred, top, 0)  # (k, n, H)
        lengths = np.linalg.norm(effects.inside(some), axis=2)  # (n, H)
        smallest = np.maximum(margin * np.abs(means[some]) * lengths, np.finfo(np.float32).tiny)  # (n, H)
        thresholds[some] = np.maximum(np.abs(largest).min(axis=0) * lengths * (1 - margin), smallest)
        signs[some] = _majority(np.moveaxis(largest, 0, 2))
    return {"pair_means": means, "pair_thresholds": thresholds, "pair_signs": signs}


def _majority(along: NDArray[np.floating]) -> NDArray[np.floating]:
    """The sign that most share; where as many have the other, that of their sum. (..., k) -> (...)"""
    balance = np.sign(along).sum(axis=-1)
    chosen = np.where(balance == 0, along.sum(axis=-1), balance)
    return np.where(chosen < 0, -1.0, 1.0).astype(along.dtype)


def _sample(stored: StoredImages, sample: int, top_k: int) -> Indices:
    count = stored.count(None)
    images = min(sample, count)
    for name, value, least in (("--sample", sample, 2), ("--top-k", top_k, 1)):
        if value < least:
            raise PlanError(f"{name} {value} tells nothing: give at least {least}")
    if images < 2:
        raise PlanError(f"{stored.folder.path} stores {images} images: ingest more before fitting them")
    if top_k >= images:
        raise PlanError(
            f"the {top_k} largest of {images} images are all of them: fit more images, or add --top-k "
            f"{max(2, images // 50)}"
        )
    return np.sort(np.random.default_rng(_SEED).permutation(count)[:images])


def _digest(stored: StoredImages, chosen: Indices) -> str:
    """Which images, of which content, were encoded and rounded how."""
    table, recipe = stored.stored[0].take(pa.array(chosen)), stored.manifest.recipe
    told = [recipe.precision, recipe.dtype, table["image_id"].to_pylist(), table["sha256"].to_pylist()]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
