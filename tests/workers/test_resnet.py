"""Pairs against the papers' code, against the stock model, and for every configuration."""

from copy import deepcopy
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import _build_vision_tower
from open_clip.modified_resnet import ModifiedResNet

from schemas.errors import PlanError, UnsupportedModelError
from schemas.recipe import Recipe
from tests.conftest import GOLDEN
from tests.workers.test_vit import capturing, lively, relative
from workers.resnet import ResnetDecomposition


def resnet_configs() -> list[str]:
    configs = {name: open_clip.get_model_config(name)["vision_cfg"] for name in open_clip.list_models()}
    return sorted(name for name, vision in configs.items() if isinstance(vision.get("layers"), list))


def cut_down(vision: dict[str, Any]) -> dict[str, Any]:
    """The architecture with one block a stage, a sixteenth of the width and four spots."""
    return {**vision, "layers": [1, 1, 1, 1], "width": vision["width"] // 8, "head_width": 16, "image_size": 64}


def rebuilt(decomposition: ResnetDecomposition, found: dict[str, torch.Tensor]) -> torch.Tensor:
    """Contributions of all pairs. (B, C, H, D)"""
    basis = {name: torch.from_numpy(array) for name, array in decomposition.basis.items()}
    return torch.einsum("bch,chr,hrd->bchd", found["pairs"], basis["pair_reads"], basis["heads"][0])


def constant(decomposition: ResnetDecomposition) -> torch.Tensor:
    return torch.from_numpy(decomposition.basis["value_biases"].sum(axis=0) + decomposition.basis["output_bias"])


def test_there_are_resnets() -> None:
    assert {"RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"} <= set(resnet_configs())


@pytest.mark.parametrize("name", resnet_configs())
def test_pairs_and_the_constant_sum_to_the_output_of_every_configuration(name: str) -> None:
    config = open_clip.get_model_config(name)
    torch.manual_seed(3)
    vision = lively(_build_vision_tower(config["embed_dim"] // 16, cut_down(config["vision_cfg"])))
    assert isinstance(vision, ModifiedResNet)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        stock = vision(images)
    decomposition = ResnetDecomposition(vision, capturing("pairs"))
    found = decomposition.encode(images)
    assert relative(found["representation"], stock) < 1e-5
    assert relative(rebuilt(decomposition, found).sum(dim=(1, 2)) + constant(decomposition), stock) < 1e-5


def test_a_whole_rn50_sums_to_its_output() -> None:
    torch.manual_seed(3)
    vision = open_clip.create_model("RN50", load_weights=False).visual.eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        stock = vision(images)
    decomposition = ResnetDecomposition(vision, capturing("pairs"))
    found = decomposition.encode(images)
    assert found["pairs"].shape == (1, 2048, 32)
    basis = {name: torch.from_numpy(array) for name, array in decomposition.basis.items()}
    read = torch.einsum("bch,chr->bhr", found["pairs"], basis["pair_reads"])
    total = torch.einsum("bhr,hrd->bd", read, basis["heads"][0]) + constant(decomposition)
    assert relative(total, stock) < 1e-5


def test_golden_pairs(golden_resnet: dict[str, np.ndarray]) -> None:
    model = open_clip.create_model(f"local-dir:{GOLDEN / 'resnet'}")
    decomposition = ResnetDecomposition(model.visual, capturing("pairs"))
    # Logits reach 700 here: float32 sums of other batch sizes differ by as much as is asked for.
    found = decomposition.encode(torch.from_numpy(golden_resnet["images"][:4]))
    pairs = rebuilt(decomposition, found)[:2].transpose(1, 2).numpy()  # (2, H, C, D)
    biases = decomposition.basis["value_biases"] + decomposition.basis["output_bias"] / 4  # (H, D)
    truth = golden_resnet["pairs_first2"]
    assert np.abs(pairs + biases[:, None] / 256 - truth).max() < 1e-6 * np.abs(truth).max()


def test_any_batch_size_gives_the_same_numbers(golden_resnet: dict[str, np.ndarray]) -> None:
    model = open_clip.create_model(f"local-dir:{GOLDEN / 'resnet'}")
    decomposition = ResnetDecomposition(model.visual, capturing("pairs"))
    images = torch.from_numpy(golden_resnet["images"][:12])
    whole = decomposition.encode(images)["pairs"]
    for size in (1, 5):
        parts = torch.cat([decomposition.encode(some)["pairs"] for some in images.split(size)])
        assert relative(parts.flatten(1), whole.flatten(1)) < 1e-5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_stays_close(golden_resnet: dict[str, np.ndarray], precision: str) -> None:
    model = open_clip.create_model(f"local-dir:{GOLDEN / 'resnet'}")
    images = torch.from_numpy(golden_resnet["images"][:4])
    full = ResnetDecomposition(deepcopy(model.visual), capturing("pairs")).encode(images)
    half = ResnetDecomposition(model.visual, capturing("pairs", precision=precision)).encode(images)
    assert half["pairs"].dtype == torch.float32
    assert 0 < relative(half["pairs"].flatten(1), full["pairs"].flatten(1)) < 0.1


@pytest.mark.parametrize(
    ("capture", "message"),
    [("neurons:0", "cannot capture neurons of a ResNet: capture pairs, which sum to neurons"), ("tokens", "tokens")],
)
def test_what_a_resnet_does_not_have_is_refused(capture: str, message: str) -> None:
    model = open_clip.create_model(f"local-dir:{GOLDEN / 'resnet'}")
    with pytest.raises(PlanError, match=message):
        ResnetDecomposition(model.visual, Recipe.of([capture], dtype="float32", precision="fp32"))


def test_a_resnet_without_its_pool_is_refused() -> None:
    vision = open_clip.create_model(f"local-dir:{GOLDEN / 'resnet'}").visual
    vision.attnpool = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="attention pool"):
        ResnetDecomposition(vision, capturing("pairs"))
