"""How a vision transformer turns its last tokens into one vector, written as weights on tokens.

Every pooling supported here has the form ``M = sum_i w_i x_i @ matrix + constants @ terms``: the last residual stream
``x``, weighted token by token (``w``, different for every image) and mapped by matrices made of weights alone.

Letters: B images, T tokens, K kept tokens, W residual width, D joint space, C constant terms.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from schemas.errors import UnsupportedModelError


@dataclass(frozen=True)
class Pooled:
    """What the last residual stream says about one batch of images."""

    weights: Tensor  # (B, K)
    constants: Tensor  # (B, C)


class Pooling(Protocol):
    """A pooling seen as weights on tokens. Static parts are float64, made from weights alone."""

    matrix: Tensor  # (W, D)
    terms: Tensor  # (C, D), what the constants multiply
    total_weight: int  # the index, among the C constants, of sum_i w_i
    averages: bool  # patch tokens, rather than read the class token

    def keep(self, tokens: Tensor) -> Tensor:
        """The tokens that pooling uses, copied so that the others can be freed. (B, T, W) -> (B, K, W)"""
        ...

    def pooled(self, stream: Tensor) -> Pooled:
        """Weights and constants of a batch, from the kept tokens of its last residual stream. (B, K, W)"""
        ...


def pooling_of(vision: VisionTransformer) -> Pooling:
    """The pooling of ``vision``.

    Raises:
        UnsupportedModelError: it pools in a way that is no fixed weighting of tokens.
    """
    if vision.attn_pool is not None:
        raise UnsupportedModelError("it pools with an attention layer of its own (attentional_pool), as some CoCa models do")
    if vision.proj is None or vision.pool_type not in ("tok", "avg"):
        raise UnsupportedModelError(f"it returns tokens, not one vector in the joint space (pool_type={vision.pool_type!r})")
    norm, projection = vision.ln_post, vision.proj.detach().cpu().double()
    if vision.pool_type == "tok":
        return ClassToken(norm, projection)
    return NormOfAverage(norm, projection) if vision.final_ln_after_pool else AverageOfNorms(norm, projection)


class _Normed:
    """``(gamma * (x - mean) / sigma + beta) @ P``: constants ``(1, w, w * mean)`` with ``w = 1 / sigma``, summed over tokens."""

    total_weight = 1

    def __init__(self, norm: nn.LayerNorm, projection: Tensor) -> None:
        self.eps = norm.eps
        self.matrix = norm.weight.detach().cpu().double()[:, None] * projection  # (W, D)
        shift = norm.bias.detach().cpu().double() @ projection  # (D,)
        self.terms = torch.stack([shift, torch.zeros_like(shift), -self.matrix.sum(dim=0)])  # (C, D)

    def pooled(self, stream: Tensor) -> Pooled:
        """See `Pooling`."""
        variance, mean = torch.var_mean(stream.float(), dim=-1, correction=0)  # (B, K) each
        weights = torch.rsqrt(variance + self.eps) / stream.shape[1]  # (B, K)
        sums = [torch.ones_like(weights[:, 0]), weights.sum(dim=1), (weights * mean).sum(dim=1)]
        return Pooled(weights, torch.stack(sums, dim=1))


class ClassToken(_Normed):
    """The class token's LayerNorm."""

    averages = False

    def keep(self, tokens: Tensor) -> Tensor:
        """See `Pooling`."""
        return tokens[:, :1].clone()


class NormOfAverage(_Normed):
    """The LayerNorm of the patch tokens' mean."""

    averages = True

    def keep(self, tokens: Tensor) -> Tensor:
        """See `Pooling`."""
        return tokens[:, 1:].mean(dim=1, keepdim=True)


class AverageOfNorms(_Normed):
    """The mean of every patch token's LayerNorm: each token keeps a scale of its own."""

    averages = True

    def keep(self, tokens: Tensor) -> Tensor:
        """See `Pooling`."""
        return tokens[:, 1:].clone()
