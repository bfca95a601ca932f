"""Scores of neurons while their coefficients are in hand: two numbers per image and neuron, by a fit made before.

Letters: B images, T tokens, N neurons, n some of them, R coefficients of a neuron.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.fits import Fit
from schemas.manifest import Sizes
from schemas.recipe import Recipe
from workers.effects import effects_of, factors

_CPU_BLOCK_BYTES: Final = 4 * 1024**2  # of coefficients: they stay in the cache from the product to the norm
_GPU_BLOCK_BYTES: Final = 512 * 1024**2


class Scorer:
    """Centred norms, and projections on the neurons' directions, in the references' view."""

    def __init__(
        self, sizes: Sizes, recipe: Recipe, basis: Mapping[str, NDArray[np.float32]], fit: Fit, device: torch.device
    ) -> None:
        self._block_bytes = _CPU_BLOCK_BYTES if device.type == "cpu" else _GPU_BLOCK_BYTES
        self._means: dict[int, Tensor] = {}  # (N, R) each
        self._factors: dict[int, Tensor] = {}  # (N, R, R) each
        self._directions: dict[int, Tensor] = {}  # (N, R, 1) each, in the factors' coordinates: unit vectors
        for layer in recipe.layers("neurons"):
            factor = factors(effects_of(sizes, recipe, basis, layer), np.arange(sizes.neurons))  # (N, R, R)
            inside = np.einsum("nr,nrs->ns", fit.directions(layer), factor)[:, :, None]  # (N, R, 1)
            self._means[layer] = torch.from_numpy(fit.means(layer)).to(device)
            self._factors[layer] = torch.from_numpy(factor).float().to(device)
            self._directions[layer] = torch.from_numpy(inside).float().to(device)

    @staticmethod
    def held_bytes(sizes: Sizes, recipe: Recipe) -> int:
        """What the factors of all captured layers take in memory, for as long as the scorer lives."""
        rows = [(sizes.layers - 1 - layer) * sizes.heads for layer in recipe.layers("neurons")]
        return sum(4 * sizes.neurons * count * (count + 2) for count in rows)

    def score(self, layer: int, activations: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """Norm and projection of what each neuron adds beyond its mean.

        Args:
            layer: whose neurons.
            activations: of the neurons at the tokens, (B, T, N).
            read: what the rows weigh the tokens by, in the references' view, (B, R, T).

        Returns:
            Two tensors (B, N).
        """
        batch, _, neurons = activations.shape
        norms, projections = read.new_empty(2, batch, neurons)
        size = max(1, self._block_bytes // (4 * batch * read.shape[1]))
        for start in range(0, neurons, size):
            some = slice(start, start + size)
            centred = activations[:, :, some].float().mT @ read.mT  # (B, n, R)
            centred -= self._means[layer][some]
            turned = torch.bmm(centred.transpose(0, 1), self._factors[layer][some])  # (n, B, R)
            norms[:, some] = torch.linalg.vector_norm(turned, dim=2).T
            projections[:, some] = torch.bmm(turned, self._directions[layer][some])[:, :, 0].T
        return norms, projections
