"""The static half of a vision transformer's decomposition, made from weights alone, in double precision.

Letters: L layers, L' later layers, H heads, E head width, G pooling groups, W residual width, N neurons, D joint
space, R coefficients of a head (the smaller of G E and D), C constant terms, P captured layers.
"""

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from schemas.recipe import Recipe
from workers.decomposition import StaticArrays
from workers.pooling import Pooling, static


def head_writes(vision: VisionTransformer, pooling: Pooling) -> Tensor:
    """From what a head reads to the joint space, the image's scales aside: ``W_O * ls_1 @ matrices``. (L, H, G E, D)"""
    layers = []
    for block in vision.transformer.resblocks:
        output = static(block.attn.out_proj.weight).T * _scale(block.ls_1)  # (W, W)
        mapped = output @ pooling.matrices  # (G, W, D)
        layers.append(mapped.unflatten(1, (block.attn.num_heads, -1)).transpose(0, 1).flatten(1, 2))  # (H, G E, D)
    return torch.stack(layers)


def make_basis(vision: VisionTransformer, pooling: Pooling, writes: Tensor, recipe: Recipe) -> StaticArrays:
    """The arrays of `schemas.layout.basis_specs`.

    A head's rows are orthonormal, so that distances, norms and angles of its contributions are those of its
    coefficients, and rounding a coefficient harms its contribution no more than itself.
    """
    columns, _ = torch.linalg.qr(writes.mT)  # (L, H, D, R)
    biases = torch.zeros(len(writes), *pooling.terms.shape, dtype=torch.double)  # (L, C, D)
    for layer, block in enumerate(vision.transformer.resblocks):
        bias = static(block.attn.out_proj.bias) * _scale(block.ls_1)  # (W,)
        biases[layer, pooling.totals] = bias @ pooling.matrices  # (G, D)
    found = {"heads": columns.mT, "norm_terms": pooling.terms, "bias_terms": biases}
    blocks = vision.transformer.resblocks
    if recipe.output_layers:
        outputs = [_neuron_outputs(blocks[layer]) for layer in recipe.output_layers]  # (N, W) each
        found |= {"neuron_outputs": torch.stack(outputs), "last_matrix": pooling.matrices[0]}
    if neurons := recipe.layers("neurons"):
        rotations = writes @ columns  # (L, H, E, R), for G = 1
        later = range(neurons[0] + 1, len(blocks))
        found["neuron_reads"] = torch.stack([_head_reads(blocks[at]) @ rotations[at] for at in later])  # (L', H, W, R)
    return {name: array.float().contiguous().numpy() for name, array in found.items()}


def _neuron_outputs(block: ResidualAttentionBlock) -> Tensor:
    """What each neuron of a block's MLP writes into the residual stream. (N, W)"""
    written: Tensor = block.mlp.get_submodule("c_proj").get_parameter("weight")  # (W, N)
    return static(written).T * _scale(block.ls_2)


def _head_reads(block: ResidualAttentionBlock) -> Tensor:
    """What the values of each head read of the residual stream, the token's scale aside: ``gamma * W_V``. (H, W, E)"""
    attention = block.attn
    values = static(attention.in_proj_weight).chunk(3)[2]  # (W, W)
    reads = static(block.ln_1.weight)[:, None] * values.T  # (W, W)
    heads: Tensor = reads.unflatten(1, (attention.num_heads, -1)).transpose(0, 1)
    return heads


def _scale(scale: nn.Module) -> Tensor | float:
    return 1.0 if isinstance(scale, nn.Identity) else static(scale.get_parameter("gamma"))
