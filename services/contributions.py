"""From coefficients to contributions, in the plain view or the papers'.

In the plain view contributions and one constant sum to the representation. The papers share the constant out: of the
last LayerNorm's terms every layer output gets ``1 / (2 L + 1)``, a head ``1 / H`` of its layer's part and of its
attention bias, a token ``1 / T`` of its head's; and all is divided by the representation's norm (the code released with
Gandelsman et al., ICLR 2024).

Letters: N images, L layers, H heads, T tokens, R coefficients of a head, D joint space, C constant terms.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

View = Literal["plain", "reference"]
Floats = NDArray[np.floating[Any]]
Contributions = NDArray[np.float32]


@dataclass(frozen=True)
class Basis:
    """The static half of contributions."""

    heads: Contributions  # (L, H, R, D), rows orthonormal
    norm_terms: Contributions  # (C, D)
    bias_terms: Contributions  # (L, C, D)

    def heads_of(self, coefficients: Floats, layers: NDArray[np.intp], heads: NDArray[np.intp]) -> Contributions:
        """Contributions of some heads, plain. (N, l, h, ..., R) -> (N, l, h, ..., D)"""
        rows = self.heads[np.ix_(layers, heads)]  # (l, h, R, D)
        wide = coefficients.astype(np.float32, copy=False)
        if wide.ndim == 4:
            wide = wide[:, :, :, None]  # (N, l, h, 1, R)
            return np.asarray(np.matmul(wide, rows)[:, :, :, 0], np.float32)
        return np.asarray(np.matmul(wide, rows), np.float32)  # (N, l, h, T, D)

    def constant(self, constants: Floats) -> Contributions:
        """The constant component, plain. (N, C) -> (N, D)"""
        return np.asarray(constants @ (self.norm_terms + self.bias_terms.sum(axis=0)), np.float32)

    def norm_share(self, constants: Floats) -> Contributions:
        """What every layer output gets of the last LayerNorm's terms. (N, C) -> (N, D)"""
        return np.asarray(constants @ self.norm_terms / (2 * len(self.heads) + 1), np.float32)

    def layer_share(self, constants: Floats, layers: NDArray[np.intp]) -> Contributions:
        """What the attention of some layers gets of the constant, all heads together. (N, C) -> (N, l, D)"""
        biases = np.einsum("nc,lcd->nld", constants, self.bias_terms[layers], optimize=True)
        return np.asarray(self.norm_share(constants)[:, None] + biases, np.float32)


def shared_out(plain: Contributions, share: Contributions, parts: int, norms: Floats) -> Contributions:
    """The references' view of contributions.

    Args:
        plain: (N, ..., D).
        share: what all parts together get of the constant, broadcastable to ``plain``.
        parts: among how many it is divided.
        norms: of the representations, (N,).
    """
    return np.asarray((plain + share / parts) / norms.reshape(-1, *(1,) * (plain.ndim - 1)), np.float32)
