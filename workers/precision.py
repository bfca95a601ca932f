"""The precision that a model runs in."""

from typing import Final

import torch

_AUTOCAST: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """A context in which matrix products are computed in ``precision``, one of `schemas.recipe.PRECISIONS`."""
    kind = torch.device(device).type
    return torch.autocast(kind, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST)
