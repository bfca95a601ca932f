"""First-order decomposition of open_clip's `VisionTransformer` (Gandelsman et al., ICLR 2024, section 3).

The representation is a sum over heads, MLPs, the embedding and a constant. The stock model runs as it is, once; only
its attention modules are exchanged for ones that compute the same and remember what each head read.

Letters: B images, L layers, H heads, E head width, T tokens, K kept tokens, G pooling groups, W residual width, D joint
space, R coefficients of a head (the smaller of G E and D), C constant terms.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.errors import PlanError, UnsupportedModelError
from workers.pooling import Pooled, Pooling, pooling_of

AUTOCAST: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Basis:
    """The static half of every contribution, made from weights alone and kept once.

    A head's rows are orthonormal, so that distances, norms and angles of its contributions are those of its
    coefficients, and rounding a coefficient harms its contribution no more than itself.
    """

    heads: NDArray[np.float32]  # (L, H, R, D)
    norm_terms: NDArray[np.float32]  # (C, D): the last LayerNorm's bias and mean
    bias_terms: NDArray[np.float32]  # (L, C, D): the biases of each attention output


@dataclass
class _Trace:
    """What one forward pass leaves behind; lists run over layers."""

    embedding: Tensor | None = None  # (B, K, W)
    stream: Tensor | None = None  # (B, K, W)
    heads: list[Tensor] = field(default_factory=list)  # (B, K, W) each: H heads of E channels
    mlps: list[Tensor] = field(default_factory=list)  # (B, K, W) each
    tokens: list[Tensor] = field(default_factory=list)  # (B, H, T, E) each
    cls_to_cls: list[Tensor] = field(default_factory=list)  # (B, W) each


class VitDecomposition:
    """Encodes batches of images and returns, beside the representation, the coefficients of its parts.

    The model is taken over: it goes on computing the same, and must not be used elsewhere while `encode` runs.

    Raises:
        UnsupportedModelError: some part of the model's output is no sum of the contributions of its parts.
        PlanError: the model has no such thing as one of the captures.
    """

    def __init__(
        self, vision: VisionTransformer, capture: Iterable[str], *, precision: str = "fp32", basis: Basis | None = None
    ) -> None:
        _check(vision)
        self.vision = vision.eval()
        self.capture = frozenset(capture)
        self.precision = precision
        self.tokens = len(vision.positional_embedding)
        self.pooling: Pooling = pooling_of(vision)
        _check_capture(self.capture, self.pooling)
        self._trace = _Trace()
        writes = _writes(vision, self.pooling)  # (L, H, G E, D)
        self.basis = basis or _basis(vision, self.pooling, writes)
        device = vision.conv1.weight.device
        rotation = writes @ torch.from_numpy(self.basis.heads).double().mT  # (L, H, G E, R)
        self._rotation = rotation.float().to(device)
        self._writes = writes.flatten(1, 2).float().to(device)  # (L, G W, D)
        self._matrices = self.pooling.matrices.flatten(0, 1).float().to(device)  # (G W, D)
        self._listen()

    @torch.no_grad()
    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Representation and coefficients of a batch, on the model's device, in float32.

        Args:
            images: preprocessed pictures, (B, 3, height, width).

        Returns:
            ``representation`` (B, D); ``constants`` (B, C); and, as captured, ``heads`` (B, L, H, R),
            ``mlps`` (B, L, D) with ``embedding`` (B, D), ``cls_to_cls`` (B, L, D), ``tokens`` (B, L, H, T, R).
        """
        self._trace = trace = _Trace()
        device = images.device.type
        with torch.autocast(device, AUTOCAST.get(self.precision), enabled=self.precision in AUTOCAST):
            output = self.vision(images)
        representation = output[0] if isinstance(output, tuple) else output  # (B, D)
        assert trace.stream is not None, "the model ran without its last LayerNorm"
        pooled = self.pooling.pooled(trace.stream)
        found = {"representation": representation.float(), "constants": pooled.constants}
        found.update(self._coefficients(trace, pooled))
        self._trace = _Trace()
        return found

    def _coefficients(self, trace: _Trace, pooled: Pooled) -> dict[str, Tensor]:
        found = {}
        weights = pooled.weights  # (B, G, K)
        if "heads" in self.capture:
            read = _weigh(trace.heads, weights)  # (B, L, G, W)
            split = read.unflatten(3, (self._rotation.shape[1], -1)).transpose(2, 3).flatten(3)  # (B, L, H, G E)
            found["heads"] = torch.einsum("blhe,lher->blhr", split, self._rotation)
        if "mlps" in self.capture:
            assert trace.embedding is not None, "the model ran without its transformer"
            added = _weigh([trace.embedding, *trace.mlps], weights).flatten(2) @ self._matrices  # (B, 1 + L, D)
            found["embedding"], found["mlps"] = added[:, 0], added[:, 1:]
        scale = weights[:, 0, :1]  # (B, 1), where the attention rows are known before the last layer: G = K = 1
        if "cls_to_cls" in self.capture:
            itself = torch.stack(trace.cls_to_cls, dim=1).float() * scale[:, :, None]  # (B, L, W)
            found["cls_to_cls"] = torch.einsum("blw,lwd->bld", itself, self._writes)
        if "tokens" in self.capture:
            scaled = torch.stack(trace.tokens, dim=1).float() * scale[:, :, None, None, None]  # (B, L, H, T, E)
            found["tokens"] = torch.einsum("blhte,lher->blhtr", scaled, self._rotation)
        return found

    def _listen(self) -> None:
        """Exchanges the attention modules and hooks the places where the residual stream is written."""
        keep = self.pooling.keep

        def embedded(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._trace.embedding = keep(args[0])

        def added(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            self._trace.mlps.append(keep(output))

        def ended(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            self._trace.stream = keep(output)

        transformer = self.vision.transformer
        if "mlps" in self.capture:
            transformer.register_forward_pre_hook(embedded)
        transformer.register_forward_hook(ended)
        for block in transformer.resblocks:
            block.attn = _Attention(block.attn, self)
            if "mlps" in self.capture:
                block.ls_2.register_forward_hook(added)

    def remember(self, query: Tensor, key: Tensor, value: Tensor, read: Tensor) -> None:
        """Takes what one layer's heads read. Query, key, value (B, H, T, E); read (B, T, W)."""
        if "heads" in self.capture:
            self._trace.heads.append(self.pooling.keep(read))
        if not self.capture & {"tokens", "cls_to_cls"}:
            return
        asking = query[:, :, :1] if self.pooling.row == "class token" else query[:, :, 1:]  # (B, H, 1 or T - 1, E)
        rows = torch.softmax(asking.float() @ key.float().transpose(2, 3) * key.shape[3] ** -0.5, dim=3)
        row = rows.mean(dim=2)  # (B, H, T)
        if "tokens" in self.capture:
            self._trace.tokens.append(row[..., None] * value)
        if "cls_to_cls" in self.capture:
            self._trace.cls_to_cls.append((row[:, :, :1] * value[:, :, 0]).flatten(1))


class _Attention(nn.Module):
    """What `nn.MultiheadAttention` computes from its own weights, with the heads told apart before they are mixed."""

    def __init__(self, attention: nn.MultiheadAttention, decomposition: VitDecomposition) -> None:
        super().__init__()
        self.attention = attention
        self._remember = decomposition.remember

    def forward(self, x: Tensor, *_: Tensor, attn_mask: Tensor | None = None, **__: bool) -> tuple[Tensor, None]:
        """Self-attention of all tokens. (B, T, W) -> (B, T, W)"""
        split = F.linear(x, self.attention.in_proj_weight, self.attention.in_proj_bias)  # (B, T, 3 W)
        heads = self.attention.num_heads
        query, key, value = split.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, E) each
        read = F.scaled_dot_product_attention(query, key, value, attn_mask).transpose(1, 2).flatten(2)  # (B, T, W)
        self._remember(query, key, value, read)
        return self.attention.out_proj(read), None


def _weigh(kept: list[Tensor], weights: Tensor) -> Tensor:
    """Sums the kept tokens with the image's weights. L of (B, K, W), (B, G, K) -> (B, L, G, W)"""
    return torch.stack([weights @ tokens.float() for tokens in kept], dim=1)


def _check(vision: nn.Module) -> None:
    if not isinstance(vision, VisionTransformer):
        raise UnsupportedModelError(f"its image tower is a {type(vision).__name__}, not open_clip's VisionTransformer")
    for block in vision.transformer.resblocks:
        if not isinstance(block, ResidualAttentionBlock):
            raise UnsupportedModelError(
                f"its blocks are of type {type(block).__name__}, which norm or scale inside attention"
            )
        if not isinstance(block.attn, nn.MultiheadAttention) or not block.attn.batch_first:
            raise UnsupportedModelError(f"its attention is a {type(block.attn).__name__} that is not batch-first")


def _check_capture(capture: frozenset[str], pooling: Pooling) -> None:
    if "cls_to_cls" in capture and pooling.row != "class token":
        raise PlanError("cannot capture cls_to_cls: this model does not read its class token")
    if "tokens" in capture and pooling.row is None:
        raise PlanError("cannot capture tokens: how much this model reads of each is not known before its last layer")


def _writes(vision: VisionTransformer, pooling: Pooling) -> Tensor:
    """From what a head reads to the joint space, the image's scales aside: ``W_O * ls_1 @ matrices``. (L, H, G E, D)"""
    layers = []
    for block in vision.transformer.resblocks:
        output = block.attn.out_proj.weight.detach().cpu().double().T * _layer_scale(block)  # (W, W)
        mapped = output @ pooling.matrices  # (G, W, D)
        layers.append(mapped.unflatten(1, (block.attn.num_heads, -1)).transpose(0, 1).flatten(1, 2))  # (H, G E, D)
    return torch.stack(layers)


def _basis(vision: VisionTransformer, pooling: Pooling, writes: Tensor) -> Basis:
    columns, _ = torch.linalg.qr(writes.mT)  # (L, H, D, R)
    biases = torch.zeros(len(writes), *pooling.terms.shape, dtype=torch.double)  # (L, C, D)
    for layer, block in enumerate(vision.transformer.resblocks):
        bias = block.attn.out_proj.bias.detach().cpu().double() * _layer_scale(block)  # (W,)
        biases[layer, pooling.totals] = bias @ pooling.matrices  # (G, D)
    return Basis(
        heads=columns.mT.float().contiguous().numpy(),
        norm_terms=pooling.terms.float().numpy(),
        bias_terms=biases.float().numpy(),
    )


def _layer_scale(block: ResidualAttentionBlock) -> Tensor | float:
    return 1.0 if isinstance(block.ls_1, nn.Identity) else block.ls_1.gamma.detach().cpu().double()
