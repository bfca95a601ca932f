"""The decomposition against the papers' code, against a slow twin, and against every architecture."""

from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.model import _build_vision_tower
from open_clip.transformer import VisionTransformer
from torch import nn

from schemas.errors import PlanError, UnsupportedModelError
from schemas.recipe import Recipe
from services.contributions import Basis, shared_out
from tests.conftest import GOLDEN
from workers.vit import VitDecomposition

EVERYTHING = ("heads", "mlps", "cls_to_cls", "tokens")


def native_configs() -> list[str]:
    configs = {name: open_clip.get_model_config(name)["vision_cfg"] for name in open_clip.list_models()}
    return sorted(
        name
        for name, vision in configs.items()
        if not vision.get("timm_model_name") and isinstance(vision.get("layers"), int)
    )


def cut_down(vision: dict[str, Any]) -> dict[str, Any]:
    """The architecture with two layers, two heads and nine patches."""
    head = vision.get("head_width", 64)
    patch = vision["patch_size"]
    return {**vision, "layers": 2, "width": 2 * head, "patch_size": patch, "image_size": 3 * patch}


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every weight, also those that start at 0 or 1, a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.5 if "bias" in name or weight.ndim < 2 else weight.shape[-1] ** -0.5
            weight.add_(scale * torch.randn(weight.shape, generator=generator))
    return model.eval()


def small(**changes: Any) -> VisionTransformer:
    vision = {"image_size": 24, "patch_size": 8, "width": 32, "head_width": 8, "layers": 3, **changes}
    torch.manual_seed(5)
    return lively(_build_vision_tower(16, vision))


def capturing(*capture: str, precision: str = "fp32") -> Recipe:
    return Recipe.of(capture, dtype="float32", precision=precision)


def summed(decomposition: VitDecomposition, found: dict[str, torch.Tensor]) -> torch.Tensor:
    basis = decomposition.basis
    heads = torch.einsum("blhr,lhrd->bd", found["heads"], torch.from_numpy(basis["heads"]))
    constant = found["constants"] @ torch.from_numpy(basis["norm_terms"] + basis["bias_terms"].sum(axis=0))
    return heads + found["mlps"].sum(dim=1) + found["embedding"] + constant


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float(((found - truth).norm(dim=-1) / truth.norm(dim=-1)).max())


@pytest.fixture(scope="module")
def golden_parts(golden_vit: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Basis]:
    model = open_clip.create_model(f"local-dir:{GOLDEN / 'vit'}")
    decomposition = VitDecomposition(model.visual, capturing(*EVERYTHING))
    found = decomposition.encode(torch.from_numpy(golden_vit["images"]))
    basis = decomposition.basis
    return {k: v.numpy() for k, v in found.items()}, Basis(basis["heads"], basis["norm_terms"], basis["bias_terms"])


def test_golden_heads(golden_vit: dict[str, np.ndarray], golden_parts: tuple[dict[str, np.ndarray], Basis]) -> None:
    found, basis = golden_parts
    layers = np.arange(4)
    norms = np.linalg.norm(found["representation"], axis=1)
    share = basis.layer_share(found["constants"], layers)[:, :, None]
    heads = shared_out(basis.heads_of(found["heads"], layers, layers), share, 4, norms)
    assert np.abs(heads - golden_vit["heads"]).max() < 1e-5


def test_golden_mlps_and_embedding(
    golden_vit: dict[str, np.ndarray], golden_parts: tuple[dict[str, np.ndarray], Basis]
) -> None:
    found, basis = golden_parts
    norms = np.linalg.norm(found["representation"], axis=1)
    plain = np.concatenate([found["embedding"][:, None], found["mlps"]], axis=1)
    mlps = shared_out(plain, basis.norm_share(found["constants"])[:, None], 1, norms)
    assert np.abs(mlps - golden_vit["mlps"]).max() < 1e-5


def test_golden_class_token_to_itself(
    golden_vit: dict[str, np.ndarray], golden_parts: tuple[dict[str, np.ndarray], Basis]
) -> None:
    found, basis = golden_parts
    norms = np.linalg.norm(found["representation"], axis=1)
    share = basis.layer_share(found["constants"], np.arange(4))
    assert np.abs(shared_out(found["cls_to_cls"], share, 17, norms) - golden_vit["cls_to_cls"]).max() < 1e-5


def test_golden_tokens(golden_vit: dict[str, np.ndarray], golden_parts: tuple[dict[str, np.ndarray], Basis]) -> None:
    found, basis = golden_parts
    layers = np.arange(4)
    norms = np.linalg.norm(found["representation"], axis=1)
    share = basis.layer_share(found["constants"], layers)[:, :, None, None]
    tokens = shared_out(basis.heads_of(found["tokens"], layers, layers), share, 4 * 17, norms)
    assert np.abs(tokens[:4].transpose(0, 1, 3, 2, 4) - golden_vit["spatial_first4"]).max() < 1e-5
    assert np.abs(tokens.sum(axis=(1, 2)) - golden_vit["tokens"]).max() < 1e-5


@pytest.mark.parametrize("name", native_configs())
def test_contributions_sum_to_the_output_of_every_native_architecture(name: str) -> None:
    config = open_clip.get_model_config(name)
    vision = lively(_build_vision_tower(48, cut_down(config["vision_cfg"]), config.get("quick_gelu", False)))
    images = torch.randn(3, 3, *vision.image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = vision(images)
    stock = output[0] if isinstance(output, tuple) else output
    decomposition = VitDecomposition(vision, capturing("heads", "mlps"))
    found = decomposition.encode(images)
    assert relative(found["representation"], stock) < 1e-5
    assert relative(summed(decomposition, found), stock) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"ls_init_value": 0.1},
        {"pool_type": "avg"},
        {"pool_type": "avg", "final_ln_after_pool": True},
        {"pool_type": "avg", "no_ln_pre": True, "ls_init_value": 0.3},
        {"final_ln_after_pool": True},
        {"head_width": 32},
        {"image_size": [16, 32]},
        {"pos_embed_type": "sin_cos_2d"},
        {"patch_dropout": 0.5},
        {"attentional_pool": True, "attn_pooler_heads": 2},
    ],
    ids=str,
)
def test_contributions_sum_to_the_output_of_variants(changes: dict[str, Any]) -> None:
    vision = small(**changes)
    images = torch.randn(4, 3, *vision.image_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        stock = vision(images)
    decomposition = VitDecomposition(vision, capturing("heads", "mlps"))
    found = decomposition.encode(images)
    assert relative(summed(decomposition, found), stock) < 1e-5


def slow_heads(vision: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """Contributions of each head from each token by the book, in float64: all rows, all products. (B, L, H, T, D)"""
    vision = vision.double()
    x = vision._embeds(images.double())
    found = []
    for block in vision.transformer.resblocks:
        attention, heads = block.attn, block.attn.num_heads
        normed = block.ln_1(x)
        query, key, value = (normed @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, dim=-1)
        split = [part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (query, key, value)]
        weights = torch.softmax(split[0] @ split[1].mT / split[0].shape[-1] ** 0.5, dim=-1)  # (B, H, T, T)
        output = attention.out_proj.weight.T.unflatten(0, (heads, -1))  # (H, E, W)
        from_each = torch.einsum("bhqt,bhte,hew->bhqtw", weights, split[2], output)
        found.append(block.ls_1(from_each))
        x = x + block.ls_1(from_each.sum(dim=(1, 3)) + attention.out_proj.bias)
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
    each = torch.stack(found, dim=1)  # (B, L, H, query, T, W)
    if vision.pool_type == "tok":
        pooled, stream = each[:, :, :, 0], x[:, 0]
    else:
        pooled, stream = each[:, :, :, 1:].mean(dim=3), x[:, 1:].mean(dim=1)
    sigma = (stream.var(dim=-1, correction=0) + vision.ln_post.eps).sqrt()
    return pooled * vision.ln_post.weight / sigma[:, None, None, None, None] @ vision.proj


@pytest.mark.parametrize(
    "changes", [{}, {"ls_init_value": 0.2}, {"pool_type": "avg", "final_ln_after_pool": True}], ids=str
)
@torch.no_grad()
def test_heads_and_tokens_equal_a_slow_twin(changes: dict[str, Any]) -> None:
    images = torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    truth = slow_heads(small(**changes), images)
    decomposition = VitDecomposition(small(**changes), capturing("heads", "tokens"))
    found = decomposition.encode(images)
    basis = torch.from_numpy(decomposition.basis["heads"]).double()
    heads = torch.einsum("blhr,lhrd->blhd", found["heads"].double(), basis)
    tokens = torch.einsum("blhtr,lhrd->blhtd", found["tokens"].double(), basis)
    assert relative(tokens, truth) < 2e-5
    assert relative(heads, truth.sum(dim=3)) < 1e-5


def test_coefficients_keep_norms_and_angles() -> None:
    decomposition = VitDecomposition(small(), capturing("heads"))
    found = decomposition.encode(torch.randn(6, 3, 24, 24))["heads"]
    contributions = torch.einsum("blhr,lhrd->blhd", found, torch.from_numpy(decomposition.basis["heads"]))
    torch.testing.assert_close(
        torch.einsum("blhr,clhr->bclh", found, found), torch.einsum("blhd,clhd->bclh", contributions, contributions)
    )


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4))
@settings(max_examples=10, deadline=None)
def test_any_batch_size_gives_the_same_numbers(sizes: list[int]) -> None:
    decomposition = VitDecomposition(small(), capturing(*EVERYTHING))
    images = torch.randn(sum(sizes), 3, 24, 24, generator=torch.Generator().manual_seed(4))
    whole = decomposition.encode(images)
    parts = [decomposition.encode(part) for part in images.split(sizes)]
    for name, values in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), values, rtol=1e-4, atol=1e-5)


def test_a_given_basis_gives_the_same_contributions() -> None:
    images = torch.randn(2, 3, 24, 24)
    first = VitDecomposition(small(), capturing("heads"))
    again = VitDecomposition(small(), capturing("heads"), basis=first.basis)
    torch.testing.assert_close(again.encode(images)["heads"], first.encode(images)["heads"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near(precision: str) -> None:
    images = torch.randn(4, 3, 24, 24)
    full = VitDecomposition(small(), capturing("heads", "mlps")).encode(images)
    half = VitDecomposition(small(), capturing("heads", "mlps", precision=precision)).encode(images)
    assert half["heads"].dtype == torch.float32
    assert relative(half["representation"], full["representation"]) < 0.05
    assert float((half["heads"] - full["heads"]).norm() / full["heads"].norm()) < 0.05


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"qk_norm": True}, "CustomResidualAttentionBlock"),
        ({"scale_attn": True}, "CustomResidualAttentionBlock"),
        ({"pool_type": "none"}, "returns tokens"),
        ({"attentional_pool": True, "attn_pooler_heads": 2, "pool_type": "avg"}, "many queries"),
    ],
)
def test_models_without_an_exact_decomposition_are_refused_with_the_reason(
    changes: dict[str, Any], reason: str
) -> None:
    vision = small(**changes)
    with pytest.raises(UnsupportedModelError, match=reason):
        VitDecomposition(vision, capturing("heads"))


def test_a_resnet_is_refused_with_the_reason() -> None:
    model = open_clip.create_model(f"local-dir:{GOLDEN / 'resnet'}")
    with pytest.raises(UnsupportedModelError, match="ModifiedResNet"):
        VitDecomposition(model.visual, capturing("heads"))


@pytest.mark.parametrize(("capture", "final"), [("cls_to_cls", True), ("tokens", False)])
def test_captures_that_averaging_leaves_no_meaning_are_refused(capture: str, final: bool) -> None:
    vision = small(pool_type="avg", final_ln_after_pool=final)
    with pytest.raises(PlanError, match=capture):
        VitDecomposition(vision, capturing(capture))
