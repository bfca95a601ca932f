"""The static half of neurons' contributions: ``contribution = coefficients @ rows``, rows made from weights alone.

A neuron of a transformer's MLP reaches the output through every head of every later layer (Gandelsman et al., ICLR
2025): one row for each of them. A neuron of a ResNet reaches it through the heads of the attention pool (Bu and
Gandelsman, 2025). Each row passes through its head's few dimensions, so two small factors are kept and no product.

Letters: N neurons, n some of them, R rows of a neuron, W residual width, E coefficients of a head, D joint space.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from schemas.manifest import Sizes
from schemas.recipe import Recipe

PERCENT: Final = 100.0  # the references give second-order effects in percent of the representation's norm

_BLOCK_BYTES: Final = 32 * 1024**2
_JITTER: Final = 1e-12  # of the mean square of a neuron's rows: rows that depend on each other have a factor, too

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Indices = NDArray[np.intp]


class Effects(Protocol):
    """The rows of a layer's neurons."""

    @property
    def heads(self) -> Floats:
        """The orthonormal basis of each row's head. (R, E, D)"""
        ...

    def __len__(self) -> int:
        """How many neurons there are."""
        ...

    def inside(self, neurons: Indices) -> Floats:
        """Each row in the coordinates of its head. (n, R, E)"""
        ...


@dataclass(frozen=True)
class MlpEffects:
    """Neurons of a transformer's MLP, through the heads of later layers."""

    outputs: Floats  # (N, W), what each neuron writes into the residual stream
    reads: Floats  # (R, W, E), what each later head reads of the stream
    heads: Floats

    def __len__(self) -> int:
        return len(self.outputs)

    def inside(self, neurons: Indices) -> Floats:
        """See `Effects`."""
        return np.ascontiguousarray(np.matmul(self.outputs[neurons], self.reads).swapaxes(0, 1))


@dataclass(frozen=True)
class PairEffects:
    """Neurons of a ResNet, through the heads of its attention pool."""

    reads: Floats  # (N, R, E)
    heads: Floats

    def __len__(self) -> int:
        return len(self.reads)

    def inside(self, neurons: Indices) -> Floats:
        """See `Effects`."""
        return self.reads[neurons]


def effects_of(sizes: Sizes, recipe: Recipe, basis: Mapping[str, Floats], layer: int) -> Effects:
    """The effects of one layer's neurons, from a store's basis."""
    if sizes.family == "resnet":
        return PairEffects(basis["pair_reads"], basis["heads"][0])
    first = recipe.layers("neurons")[0]
    return MlpEffects(
        basis["neuron_outputs"][recipe.output_layers.index(layer)],
        basis["neuron_reads"][layer - first :].reshape(-1, sizes.width, sizes.coefficients),
        basis["heads"][layer + 1 :].reshape(-1, sizes.coefficients, sizes.dim),
    )


def rows(effects: Effects, neurons: Indices) -> Floats:
    """What one coefficient adds to the representation. (n, R, D)"""
    mapped: Floats = np.matmul(effects.inside(neurons).swapaxes(0, 1), effects.heads)  # (R, n, D)
    return mapped.swapaxes(0, 1)


def factors(effects: Effects, neurons: Indices) -> Doubles:
    """Lower triangles ``F`` with ``F F^T = rows rows^T``, so that ``|c @ rows| = |c @ F|``. (n, R, R)

    Made in blocks, one to a core, so that little more than these is ever held.
    """
    count = len(effects.heads)
    found = np.empty((len(neurons), count, count))

    def factorise(block: slice) -> None:
        some = rows(effects, neurons[block]).astype(np.float64)  # (n, R, D)
        gram = some @ some.swapaxes(1, 2)  # (n, R, R)
        mean = np.trace(gram, axis1=1, axis2=2) / count  # (n,)
        gram += np.where(mean > 0, _JITTER * mean, 1)[:, None, None] * np.eye(count)
        found[block] = np.linalg.cholesky(gram) * (mean > 0)[:, None, None]  # one that writes nothing has no length

    with small_matrices(), ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(factorise, blocks(len(neurons), effects.heads[..., 0, :].nbytes * 2)):
            pass
    return found


def small_matrices() -> threadpool_limits:
    """A context for products and factors of many small matrices, on which threads cost several times what they give."""
    return threadpool_limits(1, user_api="blas")


def blocks(neurons: int, each_bytes: int) -> Iterator[slice]:
    """Some neurons at a time, so that what is made of them takes a bounded memory."""
    size = max(1, _BLOCK_BYTES // max(1, each_bytes))
    for start in range(0, neurons, size):
        yield slice(start, min(start + size, neurons))
