"""Decomposition of open_clip's `VisionTransformer`, first-order and of neurons (Gandelsman et al., ICLR 2024 and 2025).

The representation is a sum over heads, MLPs, the embedding and a constant. The stock model runs as it is, once; only
its attention modules are exchanged for ones that compute the same and remember what each head read. A neuron of an MLP
adds what each head of each later layer reads of it, ``s = sum_i a_i p_i / sigma_i``: its activations at the tokens,
weighted by the pooled row of the attention map and by the scale of the layer's LayerNorm.

Letters: B images, L layers, L' later layers, H heads, E head width, T tokens, K kept tokens, G pooling groups, W
residual width, N neurons, D joint space, R coefficients of a head (the smaller of G E and D), C constant terms, P
captured layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.errors import PlanError, UnsupportedModelError
from schemas.fits import Fit
from schemas.layout import coefficients_name
from schemas.manifest import Sizes
from schemas.recipe import Recipe
from workers.decomposition import StaticArrays
from workers.effects import PERCENT
from workers.pooling import Pooled, Pooling, moments, pooling_of
from workers.precision import autocast
from workers.scoring import Scorer
from workers.vit_basis import head_writes, make_basis


@dataclass
class _Trace:
    """What one forward pass leaves behind; lists run over layers."""

    embedding: Tensor | None = None  # (B, K, W)
    stream: Tensor | None = None  # (B, K, W)
    heads: list[Tensor] = field(default_factory=list)  # (B, K, W) each: H heads of E channels
    mlps: list[Tensor] = field(default_factory=list)  # (B, K, W) each
    tokens: list[Tensor] = field(default_factory=list)  # (B, H, T, E) each
    cls_to_cls: list[Tensor] = field(default_factory=list)  # (B, W) each
    rows: dict[int, Tensor] = field(default_factory=dict)  # (B, H, T) each, of later layers: a_i / sigma_i
    scales: dict[int, Tensor] = field(default_factory=dict)  # (B, T) each, of the same: 1 / sigma_i
    activations: dict[int, Tensor] = field(default_factory=dict)  # (B, T, N) each, of captured layers
    asked: dict[int, Tensor] = field(default_factory=dict)  # (B, K, N) each, the same at the tokens that are pooled


class VitDecomposition:
    """Encodes batches of images and returns, beside the representation, the coefficients of its parts.

    The model is taken over: it goes on computing the same, and must not be used elsewhere while `encode` runs.

    Raises:
        UnsupportedModelError: some part of the model's output is no sum of the contributions of its parts.
        PlanError: the model has no such thing as one of the captures, or no such layer.
    """

    def __init__(
        self,
        vision: VisionTransformer,
        recipe: Recipe,
        *,
        basis: StaticArrays | None = None,
    ) -> None:
        _check(vision)
        self.vision = vision.eval()
        self.pooling: Pooling = pooling_of(vision)
        self.capture = frozenset(text.partition(":")[0] for text in recipe.capture)
        _check_capture(self.capture, self.pooling)
        self._trace = _Trace()
        writes = head_writes(vision, self.pooling)  # (L, H, G E, D)
        self.sizes = _sizes(vision, writes, len(self.pooling.terms))
        self.recipe = recipe.resolved(self.sizes.neuron_layers)
        self.basis = basis or make_basis(vision, self.pooling, writes, self.recipe)
        device = vision.conv1.weight.device
        self._scorer: Scorer | None = None
        rotation = writes @ torch.from_numpy(self.basis["heads"]).double().mT  # (L, H, G E, R)
        self._rotation = rotation.float().to(device)
        self._writes = writes.flatten(1, 2).float().to(device)  # (L, G W, D)
        self._matrices = self.pooling.matrices.flatten(0, 1).float().to(device)  # (G W, D)
        self._listen()

    def score_by(self, fit: Fit) -> None:
        """From now on returns scores of neurons in place of their coefficients.

        Args:
            fit: that lacks nothing of the recipe.
        """
        device = self.vision.conv1.weight.device
        self._scorer = Scorer(self.sizes, self.recipe, self.basis, fit, device)

    @torch.no_grad()
    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Representation and coefficients of a batch, on the model's device, in float32.

        Args:
            images: preprocessed pictures, (B, 3, height, width).

        Returns:
            ``representation`` (B, D); ``constants`` (B, C); and, as captured, ``heads`` (B, L, H, R),
            ``mlps`` (B, L, D) with ``embedding`` (B, D), ``cls_to_cls`` (B, L, D), ``tokens`` (B, L, H, T, R),
            ``neurons_LAYER`` (B, N, L', H), or ``neuron_norms`` and ``neuron_projections`` (B, P, N) where there is a
            scorer, ``direct`` (B, P, N).
        """
        self._trace = trace = _Trace()
        with autocast(images.device, self.recipe.precision):
            output = self.vision(images)
        representation = output[0] if isinstance(output, tuple) else output  # (B, D)
        assert trace.stream is not None, "the model ran without its last LayerNorm"
        pooled = self.pooling.pooled(trace.stream)
        found = {"representation": representation.float(), "constants": pooled.constants}
        found.update(self._coefficients(trace, pooled))
        found.update(self._neurons(trace, pooled, found["representation"]))
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

    def _neurons(self, trace: _Trace, pooled: Pooled, representation: Tensor) -> dict[str, Tensor]:
        """What each neuron adds directly, and by later layers; each layer's activations are freed after use."""
        found: dict[str, Tensor] = {}
        if trace.asked:
            direct = [pooled.weights @ kept.float() for kept in trace.asked.values()]  # (B, 1, N) each
            found["direct"] = torch.cat(direct, dim=1)  # (B, P, N)
        if not trace.activations:
            return found
        scale = pooled.weights[:, :1, :1]  # (B, 1, 1): G = K = 1
        if self._scorer is not None:
            scale = scale * PERCENT / representation.norm(dim=1)[:, None, None]
        rows = {layer: row * scale for layer, row in trace.rows.items()}  # (B, H, T) each
        scores = []
        for layer in self.recipe.layers("neurons"):
            read = torch.cat([rows[later] for later in range(layer + 1, self.sizes.layers)], dim=1)  # (B, L' H, T)
            activations = trace.activations.pop(layer)  # (B, T, N)
            if self._scorer is not None:
                scores.append(self._scorer.score(layer, activations, read))
            else:
                coefficients = activations.float().mT @ read.mT  # (B, N, L' H)
                found[coefficients_name(layer)] = coefficients.unflatten(2, (-1, self.sizes.heads))
        if scores:
            found["neuron_norms"] = torch.stack([norms for norms, _ in scores], dim=1)  # (B, P, N)
            found["neuron_projections"] = torch.stack([projections for _, projections in scores], dim=1)  # (B, P, N)
        return found

    def _listen(self) -> None:
        """Exchanges the attention modules and hooks the places where the residual stream is written and read."""
        transformer = self.vision.transformer
        transformer.register_forward_hook(self._ended)
        if "mlps" in self.capture:
            transformer.register_forward_pre_hook(self._embedded)
        first, *_ = (*self.recipe.layers("neurons"), len(transformer.resblocks))
        for layer, block in enumerate(transformer.resblocks):
            block.attn = _Attention(block.attn, partial(self._remember, layer, is_later=layer > first))
            if layer > first:
                block.ln_1.register_forward_pre_hook(partial(self._normed, layer))
            if layer in self.recipe.output_layers:
                block.mlp.c_proj.register_forward_pre_hook(partial(self._fired, layer))
            if "mlps" in self.capture:
                block.ls_2.register_forward_hook(self._added)

    def _embedded(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._trace.embedding = self.pooling.keep(args[0])

    def _normed(self, layer: int, norm: nn.LayerNorm, args: tuple[Tensor, ...]) -> None:
        self._trace.scales[layer] = moments(args[0], norm.eps)[1]

    def _fired(self, layer: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if layer in self.recipe.layers("neurons"):
            self._trace.activations[layer] = args[0]
        if layer in self.recipe.layers("direct"):
            self._trace.asked[layer] = self.pooling.keep(args[0])

    def _added(self, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        self._trace.mlps.append(self.pooling.keep(output))

    def _ended(self, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        self._trace.stream = self.pooling.keep(output)

    def _remember(self, layer: int, query: Tensor, key: Tensor, value: Tensor, read: Tensor, *, is_later: bool) -> None:
        """Takes what one layer's heads read. Query, key, value (B, H, T, E); read (B, T, W)."""
        if "heads" in self.capture:
            self._trace.heads.append(self.pooling.keep(read))
        if is_later or self.capture & {"tokens", "cls_to_cls"}:
            with autocast(query.device, "fp32"):  # this is few rows, and what is captured sums to what was read
                self._remember_rows(layer, query, key.float(), value, is_later=is_later)

    def _remember_rows(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, is_later: bool) -> None:
        asking = query[:, :, :1] if self.pooling.row == "class token" else query[:, :, 1:]  # (B, H, 1 or T - 1, E)
        rows = torch.softmax(asking.float() @ key.mT * key.shape[3] ** -0.5, dim=3)
        row = rows.mean(dim=2)  # (B, H, T)
        if is_later:
            self._trace.rows[layer] = row * self._trace.scales.pop(layer)[:, None]
        if "tokens" in self.capture:
            self._trace.tokens.append(row[..., None] * value)
        if "cls_to_cls" in self.capture:
            self._trace.cls_to_cls.append((row[:, :, :1] * value[:, :, 0]).flatten(1))


class _Attention(nn.Module):
    """What `nn.MultiheadAttention` computes from its own weights, with the heads told apart before they are mixed."""

    def __init__(
        self, attention: nn.MultiheadAttention, remember: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    ) -> None:
        super().__init__()
        self.attention = attention
        self._remember = remember

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


def _sizes(vision: VisionTransformer, writes: Tensor, terms: int) -> Sizes:
    layers, heads, reads, dim = writes.shape
    first: ResidualAttentionBlock = vision.transformer.resblocks[0]
    return Sizes(
        family="vit",
        layers=layers,
        heads=heads,
        coefficients=min(reads, dim),
        tokens=len(vision.positional_embedding),
        neurons=first.mlp.c_proj.in_features,
        width=first.mlp.c_proj.out_features,
        dim=dim,
        terms=terms,
    )


def _check_capture(capture: frozenset[str], pooling: Pooling) -> None:
    if "pairs" in capture:
        raise PlanError("cannot capture pairs of a transformer: they are a ResNet's; capture neurons:LAYERS")
    if "neurons" in capture and pooling.row is None:
        raise PlanError(
            "cannot capture neurons: how much this model reads of each token is not known before its last layer"
        )
    if "direct" in capture and len(pooling.matrices) != 1:
        raise PlanError("cannot capture direct: this model's pooler reads each neuron through several heads")
    if "cls_to_cls" in capture and pooling.row != "class token":
        raise PlanError("cannot capture cls_to_cls: this model does not read its class token")
    if "tokens" in capture and pooling.row is None:
        raise PlanError("cannot capture tokens: how much this model reads of each is not known before its last layer")
