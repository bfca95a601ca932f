"""What capturing costs beside a plain forward pass: ViT-B/32, CPU, batch 16, float32."""

from copy import deepcopy
from pathlib import Path

import open_clip
import torch

from schemas.recipe import Recipe
from tests.bench.pairs import time_pairs
from tests.bench.table import Row
from workers.vit import VitDecomposition


def measure(_: Path) -> list[Row]:
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32", load_weights=False, pretrained_text=False).eval()
    images = torch.randn(16, 3, 224, 224)
    promises = [(("heads", "mlps"), 1.10), (("heads", "mlps", "cls_to_cls", "tokens"), None)]
    rows = []
    for captured, most in promises:
        decomposition = VitDecomposition(deepcopy(model.visual), Recipe.of(captured, dtype="float16", precision="fp32"))

        @torch.no_grad()
        def plain() -> torch.Tensor:
            return model.encode_image(images)

        pairs = time_pairs(plain, lambda: decomposition.encode(images), runs=25, warm_up=3)  # noqa: B023
        rows.append(
            Row(
                f"capture of {', '.join(captured)} / plain `encode_image`, ViT-B/32, batch 16",
                f"<= {most:.2f}" if most else "-",
                f"{pairs.ratio:.3f} ({pairs.spread})",
                most is None or pairs.ratio <= most,
            )
        )
    return rows
