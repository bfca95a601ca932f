"""Scores of neurons while their coefficients are in hand: two numbers per image and neuron, by a fit made before.

Letters: B images, N neurons, R coefficients of a neuron, P captured layers.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.fits import Fit
from schemas.manifest import Sizes
from schemas.recipe import Recipe
from workers.effects import effects_of, factors


class Scorer:
    """Centred norms, and projections on the neurons' directions, in the references' view."""

    def __init__(
        self, sizes: Sizes, recipe: Recipe, basis: Mapping[str, NDArray[np.float32]], fit: Fit, device: torch.device
    ) -> None:
        self._means: dict[int, Tensor] = {}  # (N, R) each
        self._factors: dict[int, Tensor] = {}  # (N, R, R) each
        self._directions: dict[int, Tensor] = {}  # (N, R, 1) each, in the factors' coordinates: unit vectors
        for layer in recipe.layers("neurons"):
            factor = factors(effects_of(sizes, recipe, basis, layer), np.arange(sizes.neurons))  # (N, R, R)
            inside = np.einsum("nr,nrs->ns", fit.directions(layer), factor)[:, :, None]  # (N, R, 1)
            self._means[layer] = torch.from_numpy(fit.means(layer)).to(device)
            self._factors[layer] = torch.from_numpy(factor).float().to(device)
            self._directions[layer] = torch.from_numpy(inside).float().to(device)

    def score(self, layer: int, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Norm and projection of what each neuron adds beyond its mean.

        Args:
            layer: whose neurons.
            coefficients: in the references' view, (B, N, R).

        Returns:
            Two tensors (B, N).
        """
        centred = (coefficients - self._means[layer]).transpose(0, 1)  # (N, B, R)
        turned = torch.bmm(centred, self._factors[layer])  # (N, B, R)
        projections = torch.bmm(turned, self._directions[layer])[:, :, 0]  # (N, B)
        return turned.norm(dim=2).T, projections.T
