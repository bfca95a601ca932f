"""Which decomposition goes with which image tower."""

from open_clip.modified_resnet import ModifiedResNet
from torch import nn

from schemas.recipe import Recipe
from workers.decomposition import StaticArrays
from workers.resnet import ResnetDecomposition
from workers.vit import VitDecomposition


def decompose(
    vision: nn.Module, recipe: Recipe, basis: StaticArrays | None = None
) -> ResnetDecomposition | VitDecomposition:
    """The decomposition of an image tower, which takes it over.

    Raises:
        UnsupportedModelError: no exact one is known.
        PlanError: the tower has no such thing as one of the captures.
    """
    if isinstance(vision, ModifiedResNet):
        return ResnetDecomposition(vision, recipe, basis=basis)
    return VitDecomposition(vision, recipe, basis=basis)
