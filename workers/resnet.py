"""Decomposition of open_clip's `ModifiedResNet` into pairs of neurons and pooling heads (Bu and Gandelsman, 2025).

The representation is what an attention pool reads of the last feature map, whose channels are the neurons. Only its
mean token asks, and the values of tokens are not needed: a head weighs the tokens once, and what it then reads of each
neuron, ``s = sum_i a_i z_i``, is both the pair's only coefficient and all that the output needs.

Letters: B images, T tokens, C neurons (channels), H heads, E head width, D joint space, R coefficients of a head (the
smaller of E and D).
"""

from typing import Final

import torch
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from torch import Tensor, nn

from schemas.errors import PlanError, UnsupportedModelError
from schemas.manifest import Sizes
from schemas.recipe import Recipe
from workers.decomposition import StaticArrays
from workers.pooling import static
from workers.precision import autocast

_CAPTURES: Final = ("pairs",)


class ResnetDecomposition:
    """Encodes batches of images and returns, beside the representation, one number per pair.

    The model is taken over: it goes on computing the same, and must not be used elsewhere while `encode` runs.

    Raises:
        UnsupportedModelError: the model does not end in an attention pool.
        PlanError: a ResNet has no such thing as one of the captures.
    """

    def __init__(self, vision: ModifiedResNet, recipe: Recipe, *, basis: StaticArrays | None = None) -> None:
        if not isinstance(vision.attnpool, AttentionPool2d):
            raise UnsupportedModelError("its ResNet does not end in an attention pool")
        for text in recipe.capture:
            if text not in _CAPTURES:
                way = "capture pairs, which sum to neurons" if text.startswith("neurons") else "capture pairs"
                raise PlanError(f"cannot capture {text.partition(':')[0]} of a ResNet: {way}")
        self.vision = vision.eval()
        self.recipe = recipe
        pool = vision.attnpool
        heads, dim = pool.num_heads, pool.c_proj.out_features
        tokens, channels = pool.positional_embedding.shape
        self.basis = basis or _basis(pool)
        self.sizes = Sizes(
            family="resnet",
            layers=1,
            heads=heads,
            coefficients=self.basis["heads"].shape[2],
            tokens=tokens,
            neurons=channels,
            width=channels,
            dim=dim,
            terms=1,
        )
        self._pool = _Pool(pool)
        vision.attnpool = self._pool

    @torch.no_grad()
    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Representation (B, D) and ``pairs`` (B, C, H) of a batch, in float32. (B, 3, height, width)"""
        with autocast(images.device, self.recipe.precision):
            representation = self.vision(images)  # (B, D)
        return {"representation": representation.float(), "pairs": self._pool.read.mT}


class _Pool(nn.Module):
    """What `AttentionPool2d` computes for its first token; ``read`` is what each head read of each neuron."""

    def __init__(self, pool: AttentionPool2d) -> None:
        super().__init__()
        self.pool = pool
        self.read = torch.empty(0)  # (B, H, C)

    def forward(self, x: Tensor) -> Tensor:
        """The pooled image. (B, C, height, width) -> (B, D)"""
        pool, heads = self.pool, self.pool.num_heads
        with autocast(x.device, "fp32"):  # it is cheap, and the sum of many
            spots = x.float().flatten(2).mT  # (B, T - 1, C)
            tokens = torch.cat([spots.mean(dim=1, keepdim=True), spots], dim=1) + pool.positional_embedding  # (B, T, C)
            query = pool.q_proj(tokens[:, 0]).unflatten(1, (heads, -1))  # (B, H, E)
            # Asking the tokens by `q W_K` would spare the keys, but in another order of sums: where logits reach
            # hundreds, the attention would differ from the model's own by more than its rounding.
            keys = pool.k_proj(tokens).unflatten(2, (heads, -1)).transpose(1, 2)  # (B, H, T, E)
            logits = (query[:, :, None] @ keys.mT)[:, :, 0] * query.shape[2] ** -0.5  # (B, H, T)
            attention = torch.softmax(logits, dim=2)  # (B, H, T)
            self.read = attention @ tokens  # (B, H, C)
            values = pool.v_proj.weight.unflatten(0, (heads, -1))  # (H, E, C)
            heard = torch.einsum("bhc,hec->bhe", self.read, values).flatten(1) + pool.v_proj.bias  # (B, C)
            return pool.c_proj(heard)  # type: ignore[no-any-return]


def _basis(pool: AttentionPool2d) -> StaticArrays:
    heads = pool.num_heads
    writes = static(pool.c_proj.weight).T.unflatten(0, (heads, -1))  # (H, E, D)
    columns, _ = torch.linalg.qr(writes.mT)  # (H, D, R)
    values = static(pool.v_proj.weight).T.unflatten(1, (heads, -1))  # (C, H, E)
    biases = torch.einsum("he,hed->hd", static(pool.v_proj.bias).view(heads, -1), writes)  # (H, D)
    found = {
        "heads": columns.mT[None],  # (1, H, R, D)
        "pair_reads": torch.einsum("che,her->chr", values, writes @ columns),  # (C, H, R)
        "value_biases": biases,
        "output_bias": static(pool.c_proj.bias),  # (D,)
    }
    return {name: array.float().contiguous().numpy() for name, array in found.items()}
