"""Second-order and direct effects of neurons, against the papers' code and against slow twins."""

from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor

from schemas.errors import PlanError
from schemas.fits import Fit
from services.fitting import fit_neurons
from tests.conftest import GOLDEN
from tests.workers.test_vit import capturing, relative, small
from workers.effects import effects_of, factors, rows
from workers.vit import VitDecomposition


def contributions(decomposition: VitDecomposition, found: dict[str, Tensor], layer: int) -> np.ndarray:
    """Of all neurons of a layer. (B, N, D)"""
    effects = effects_of(decomposition.sizes, decomposition.recipe, decomposition.basis, layer)
    numbers = found[f"neurons_{layer}"].flatten(2).numpy()  # (B, N, R)
    return np.einsum("bnr,nrd->bnd", numbers, rows(effects, np.arange(len(effects))))


def test_golden_second_order_effects_up_to_one_vector_common_to_all_neurons(
    golden_vit: dict[str, np.ndarray], golden_second_order: dict[str, np.ndarray]
) -> None:
    model = open_clip.create_model(f"local-dir:{GOLDEN / 'vit'}")
    decomposition = VitDecomposition(model.visual, capturing("neurons:all"))
    found = decomposition.encode(torch.from_numpy(golden_vit["images"][:8]))
    norms = found["representation"].norm(dim=1).numpy()
    for layer in range(3):
        truth = golden_second_order[f"phi_layer{layer}_first8"]  # (8, N, D)
        difference = 100 * contributions(decomposition, found, layer) / norms[:, None, None] - truth
        spread = np.linalg.norm(difference - difference.mean(axis=1, keepdims=True), axis=2)
        assert spread.max() < 1e-5 * np.linalg.norm(truth, axis=2).mean()


def removed(decomposition_of: Any, layer: int, neuron: int, images: Tensor) -> Tensor:
    """What a neuron adds through the values of later heads, by brute force: attention, scales and all else frozen."""
    vision = decomposition_of()
    blocks = vision.transformer.resblocks
    rowsums: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}

    def fired(_: object, args: tuple[Tensor, ...]) -> None:
        state["written"] = args[0][..., neuron : neuron + 1] * blocks[layer].mlp.c_proj.weight[:, neuron]
        scale = getattr(blocks[layer].ls_2, "gamma", None)
        state["written"] = state["written"] if scale is None else state["written"] * scale

    def normed(at: int) -> Any:
        def hook(_: object, args: tuple[Tensor, ...]) -> None:
            block, stream = blocks[at], args[0].double()
            attention, norm = block.attn, block.ln_1
            width = stream.shape[2]
            scale = 1 / torch.sqrt(stream.var(dim=2, correction=0, keepdim=True) + norm.eps)
            y = (stream - stream.mean(dim=2, keepdim=True)) * scale * norm.weight + norm.bias
            weight, bias = attention.in_proj_weight.double(), attention.in_proj_bias.double()
            query, key = (
                (y @ weight[a : a + width].T + bias[a : a + width])
                .unflatten(2, (attention.num_heads, -1))
                .transpose(1, 2)
                for a in (0, width)
            )
            maps = torch.softmax(query @ key.mT * query.shape[3] ** -0.5, dim=3)  # (B, H, T, T)
            seen = (state["written"].double() * scale * norm.weight) @ weight[2 * width :].T  # (B, T, W), no mean taken
            read = maps @ seen.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)  # (B, H, T, E)
            out = read.transpose(1, 2).flatten(2) @ attention.out_proj.weight.double().T
            gamma = getattr(block.ls_1, "gamma", None)
            rowsums[at] = out if gamma is None else out * gamma

        return hook

    blocks[layer].mlp.c_proj.register_forward_pre_hook(fired)
    for at in range(layer + 1, len(blocks)):
        blocks[at].ln_1.register_forward_pre_hook(normed(at))
    last: list[Tensor] = []
    vision.transformer.register_forward_hook(lambda _, __, output: last.append(output.double()))
    with torch.no_grad():
        vision(images)
        added = sum(rowsums.values())  # (B, T, W)
        stream, norm = last[0], vision.ln_post
        if vision.pool_type == "tok":
            stream, added = stream[:, 0], added[:, 0]
        else:
            stream, added = stream[:, 1:].mean(dim=1), added[:, 1:].mean(dim=1)
        scale = 1 / torch.sqrt(stream.var(dim=1, correction=0, keepdim=True) + norm.eps)
        return (added * scale * norm.weight) @ vision.proj.double()


@pytest.mark.parametrize(
    "changes", [{}, {"ls_init_value": 0.5}, {"pool_type": "avg", "final_ln_after_pool": True}, {"no_ln_pre": True}]
)
def test_effects_are_what_later_heads_read_of_the_neuron(changes: dict[str, Any]) -> None:
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    decomposition = VitDecomposition(small(**changes), capturing("neurons:0-1"))
    found = decomposition.encode(images)
    for layer, neuron in ((0, 3), (1, 17)):
        truth = removed(lambda: small(**changes), layer, neuron, images)
        fast = torch.from_numpy(contributions(decomposition, found, layer)[:, neuron])
        assert relative(fast.double(), truth) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"ls_init_value": 0.5}, {"pool_type": "avg"}])
def test_direct_effects_and_a_bias_sum_to_the_mlp(changes: dict[str, Any]) -> None:
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    vision = small(**changes)
    scales = [getattr(block.ls_2, "gamma", torch.ones(())).detach() for block in vision.transformer.resblocks]
    biases = [
        block.mlp.c_proj.bias.detach() * scale
        for block, scale in zip(vision.transformer.resblocks, scales, strict=True)
    ]
    decomposition = VitDecomposition(vision, capturing("mlps", "direct:all"))
    found = decomposition.encode(images)
    basis = {name: torch.from_numpy(array) for name, array in decomposition.basis.items()}
    added = torch.einsum("bln,lnw->blw", found["direct"], basis["neuron_outputs"]) + (
        found["constants"][:, 1, None, None] * torch.stack(biases)
    )
    assert relative((added @ basis["last_matrix"]).flatten(1), found["mlps"].flatten(1)) < 1e-5


@pytest.mark.parametrize("size", [1, 3])
def test_any_batch_size_gives_the_same_coefficients(size: int) -> None:
    images = torch.randn(7, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    decomposition = VitDecomposition(small(), capturing("neurons:all", "direct:all"))
    whole = decomposition.encode(images)
    parts = [decomposition.encode(some) for some in images.split(size)]
    for name in ("neurons_0", "neurons_1", "direct"):
        together = torch.cat([part[name] for part in parts])
        assert relative(together.flatten(1), whole[name].flatten(1)) < 1e-5


def test_scores_while_encoding_are_those_of_the_vectors() -> None:
    images = torch.randn(9, 3, 24, 24, generator=torch.Generator().manual_seed(4))
    plain = VitDecomposition(small(), capturing("neurons:all"))
    found = plain.encode(images)
    norms = found["representation"].norm(dim=1).numpy()
    arrays, truth = {}, {}
    for layer in range(2):
        effects = effects_of(plain.sizes, plain.recipe, plain.basis, layer)
        every = np.arange(len(effects))
        numbers = 100 * found[f"neurons_{layer}"].flatten(2).double().numpy() / norms[:, None, None]
        fitted = fit_neurons(numbers.swapaxes(0, 1), factors(effects, every), 4)
        arrays |= {f"means_{layer}": fitted.means.astype("f"), f"directions_{layer}": fitted.directions.astype("f")}
        vectors = np.einsum("bnr,nrd->bnd", numbers - fitted.means, rows(effects, every))
        directions = np.einsum("nr,nrd->nd", fitted.directions, rows(effects, every))
        truth[layer] = np.linalg.norm(vectors, axis=2), np.einsum("bnd,nd->bn", vectors, directions)
    fit = Fit("m", "s", 9, 4, "now", (0, 1), len(every), (8, 4), 0, arrays)
    recipe = capturing("neurons:all")
    scoring = VitDecomposition(small(), recipe)
    scoring.score_by(fit)
    scored = scoring.encode(images)
    assert "neurons_0" not in scored
    for layer in range(2):
        for name, expected in zip(("neuron_norms", "neuron_projections"), truth[layer], strict=True):
            np.testing.assert_allclose(scored[name][:, layer], expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("changes", "capture", "message"),
    [
        ({}, "neurons:2", "cannot capture neurons:2: layers 0 to 1 of this model have such neurons"),
        ({}, "direct:3", "cannot capture direct:3: layers 0 to 2 of this model have such neurons"),
        ({"layers": 1}, "neurons:all", "no layer of it has such neurons"),
        ({}, "pairs", "cannot capture pairs of a transformer"),
        ({"pool_type": "avg"}, "neurons:all", "not known before its last layer"),
    ],
)
def test_neurons_that_are_not_there_are_refused(changes: dict[str, Any], capture: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        VitDecomposition(small(**changes), capturing(capture))
