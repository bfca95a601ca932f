"""What the decompositions of all image towers have in common."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from schemas.manifest import Sizes
from schemas.recipe import Recipe

StaticArrays = Mapping[str, NDArray[np.float32]]


class Decomposition(Protocol):
    """Encodes batches of images and returns, beside the representation, the coefficients of the model's parts."""

    sizes: Sizes
    recipe: Recipe  # resolved
    basis: StaticArrays

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Representation and coefficients of a batch, float32, by array. (B, 3, height, width) -> (B, ...) each"""
        ...
