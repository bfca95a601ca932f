"""How a vision transformer turns its last tokens into one vector, written as weights on tokens.

Every pooling supported here has the form ``M = sum_gi w_gi x_i @ matrices_g + constants @ terms``: the last residual
stream ``x``, weighted token by token (``w``, different for every image) and mapped by matrices made of weights alone.
Reading the class token or averaging has one group ``g``; an attentional pooler has one for each of its own heads.

Letters: B images, T tokens, K kept tokens, G groups, W residual width, V pooled width, D joint space, C constant terms.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from open_clip.transformer import AttentionalPooler, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.errors import UnsupportedModelError

Row = Literal["class token", "patch tokens"]


@dataclass(frozen=True)
class Pooled:
    """What the last residual stream says about one batch of images."""

    weights: Tensor  # (B, G, K)
    constants: Tensor  # (B, C)


class Pooling(Protocol):
    """A pooling seen as weights on tokens. Static parts are float64, made from weights alone."""

    matrices: Tensor  # (G, W, D)
    terms: Tensor  # (C, D), what the constants multiply
    totals: slice  # which of the C constants are sum_i w_gi, for each g
    row: Row | None  # whose rows of the attention maps are pooled; None where that differs by token and image

    def keep(self, tokens: Tensor) -> Tensor:
        """The tokens that pooling uses, copied so that the others can be freed. (B, T, W) -> (B, K, W)"""
        ...

    def pooled(self, stream: Tensor) -> Pooled:
        """Weights and constants of a batch, from the kept tokens of its last residual stream. (B, K, W)"""
        ...


def pooling_of(vision: VisionTransformer) -> Pooling:
    """The pooling of ``vision``.

    Raises:
        UnsupportedModelError: it pools in a way that is no weighting of tokens.
    """
    projection = vision.proj
    if projection is None or vision.pool_type not in ("tok", "avg"):
        raise UnsupportedModelError(
            f"it returns tokens, not one vector in the joint space (pool_type={vision.pool_type!r})"
        )
    norm, projection = vision.ln_post, static(projection)
    if vision.attn_pool is not None:
        if vision.pool_type != "tok":
            raise UnsupportedModelError("it averages the many queries of its attentional pooler")
        return FirstQuery(vision.attn_pool, norm, projection)
    if vision.pool_type == "tok":
        return ClassToken(norm, projection)
    return NormOfAverage(norm, projection) if vision.final_ln_after_pool else AverageOfNorms(norm, projection)


class _Normed:
    """``(gamma * (x - mean) / sigma + beta) @ P``, averaged over the kept tokens.

    With ``w = 1 / sigma``, divided by their number, the constants are ``(1, sum w, sum w * mean)``.
    """

    totals = slice(1, 2)

    def __init__(self, norm: nn.LayerNorm, projection: Tensor) -> None:
        self.eps = norm.eps
        matrix = static(norm.weight)[:, None] * projection  # (W, D)
        shift = static(norm.bias) @ projection  # (D,)
        self.matrices = matrix[None]  # (1, W, D)
        self.terms = torch.stack([shift, torch.zeros_like(shift), -matrix.sum(dim=0)])  # (C, D)

    def pooled(self, stream: Tensor) -> Pooled:
        """See `Pooling`."""
        mean, scale = moments(stream, self.eps)  # (B, K) each
        weights = scale / stream.shape[1]  # (B, K)
        constants = [torch.ones_like(weights[:, 0]), weights.sum(dim=1), (weights * mean).sum(dim=1)]
        return Pooled(weights[:, None], torch.stack(constants, dim=1))


class ClassToken(_Normed):
    """The class token's LayerNorm."""

    row: Row | None = "class token"

    def keep(self, tokens: Tensor) -> Tensor:
        """See `Pooling`."""
        return tokens[:, :1].clone()


class NormOfAverage(_Normed):
    """The LayerNorm of the patch tokens' mean."""

    row: Row | None = "patch tokens"

    def keep(self, tokens: Tensor) -> Tensor:
        """See `Pooling`."""
        return tokens[:, 1:].mean(dim=1, keepdim=True)


class AverageOfNorms(_Normed):
    """The mean of every patch token's LayerNorm: each token has a scale of its own."""

    row: Row | None = None

    def keep(self, tokens: Tensor) -> Tensor:
        """See `Pooling`."""
        return tokens[:, 1:].clone()


class FirstQuery:
    """CoCa's pooler: a learned query attends to the normed tokens, and what it reads, ``y``, is normed once more.

    With the query's attention ``a_gi`` in head ``g`` of the pooler, ``mean_i`` and ``sigma_i`` of the first LayerNorm
    and ``mean`` and ``sigma`` of the second, ``w_gi = a_gi / (sigma_i sigma)``. The constants are
    ``(1, 1 / sigma, mean / sigma)``, then ``sum_i w_gi`` and ``sum_i w_gi mean_i`` for each ``g``.
    """

    row: Row | None = None

    def __init__(self, pooler: AttentionalPooler, norm: nn.LayerNorm, projection: Tensor) -> None:
        self.inner, self.outer_eps = pooler.ln_k, norm.eps
        attention = pooler.attn
        groups = attention.num_heads
        separate = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        query, key, value = separate if attention.in_proj_weight is None else attention.in_proj_weight.chunk(3)
        query_bias, _, value_bias = attention.in_proj_bias.chunk(3)
        asked = F.linear(pooler.ln_q(pooler.query[:1]), query, query_bias).detach()  # (1, V)
        scaled = asked.view(groups, -1) * (len(query) // groups) ** -0.5  # (G, E)
        # q . (W_K x + b_K) = (q W_K) . x + const, and a softmax over tokens does not see the constant.
        self.asked = torch.einsum("ge,gew->gw", scaled, key.detach().unflatten(0, (groups, -1)))  # (G, W)
        reads = static(value).unflatten(0, (groups, -1)).mT  # (G, W, E)
        mixes = static(attention.out_proj.weight).T.unflatten(0, (groups, -1))  # (G, E, V)
        read = reads @ mixes  # (G, W, V)
        biases = static(value_bias) @ mixes.flatten(0, 1) + static(attention.out_proj.bias)  # (V,)
        self.read, self.biases = read.float().to(asked.device), biases.float().to(asked.device)
        after = static(norm.weight)[:, None] * projection  # (V, D)
        self.matrices = static(pooler.ln_k.weight)[:, None] * read @ after  # (G, W, D)
        heard = static(pooler.ln_k.bias) @ read.sum(dim=0) + biases  # (V,)
        first = torch.stack([static(norm.bias) @ projection, heard @ after, -after.sum(dim=0)])  # (3, D)
        means = -self.matrices.sum(dim=1)  # (G, D)
        self.terms = torch.cat([first, torch.zeros_like(means), means])  # (3 + 2 G, D)
        self.totals = slice(3, 3 + groups)

    def keep(self, tokens: Tensor) -> Tensor:
        """See `Pooling`."""
        return tokens

    def pooled(self, stream: Tensor) -> Pooled:
        """See `Pooling`."""
        stream = stream.float()
        normed = self.inner(stream)  # (B, K, W)
        attention = torch.softmax(torch.einsum("gw,bkw->bgk", self.asked, normed), dim=2)  # (B, G, K)
        y = torch.einsum("bgk,bkw,gwv->bv", attention, normed, self.read) + self.biases  # (B, V)
        mean, scale = moments(y, self.outer_eps)  # (B,) each
        means, scales = moments(stream, self.inner.eps)  # (B, K) each
        weights = attention * (scales * scale[:, None])[:, None]  # (B, G, K)
        static = torch.stack([torch.ones_like(scale), scale, mean * scale], dim=1)  # (B, 3)
        sums = torch.cat([weights.sum(dim=2), torch.einsum("bgk,bk->bg", weights, means)], dim=1)  # (B, 2 G)
        return Pooled(weights, torch.cat([static, sums], dim=1))


def static(weight: Tensor) -> Tensor:
    """A weight to compute static arrays with: double precision, where every processor can."""
    return weight.detach().cpu().double()


def moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What a LayerNorm subtracts, and what it multiplies by. (..., W) -> (...) each"""
    _, mean, scale = torch.native_layer_norm(x.float(), x.shape[-1:], None, None, eps)  # ten times `var_mean`'s speed
    return mean[..., 0], scale[..., 0]
