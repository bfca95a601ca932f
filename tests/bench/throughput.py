"""A whole ingest beside a bare loop that decodes and encodes the same images and stores nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import median

import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from schemas.recipe import Recipe
from tests.bench.pairs import time_pairs
from tests.bench.table import Row
from workers.ingest import run_ingest
from workers.models import load_model
from workers.planning import plan_ingest
from workers.request import Request
from workers.toyworld.attributes import World
from workers.toyworld.scenes import scene

BATCH = 32


class Silent:
    def encoded(self, images: int, failed: int) -> None: ...
    def wrote(self, size: int) -> None: ...


def draw(folder: Path, count: int) -> Path:
    """Scenes as small files, drawn once."""
    folder.mkdir(exist_ok=True)
    for index in range(count):
        file = folder / f"{index:05d}.png"
        if not file.exists():
            Image.fromarray(scene(World(), seed=21, index=index).picture).save(file)
    return folder


def random_model(folder: Path, name: str) -> str:
    """An untrained model in a folder of its own: its speed is that of a trained one."""
    place = folder / f"model-{name}"
    if not place.exists():
        place.mkdir()
        torch.manual_seed(0)
        model = open_clip.create_model(name, load_weights=False, pretrained_text=False)
        config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": {}}
        (place / "open_clip_config.json").write_text(json.dumps(config))
        save_file(model.state_dict(), place / "model.safetensors")
    return str(place)


def request(source: Path, store: Path, model: str, dtype: str = "float16", **changes: object) -> Request:
    recipe = Recipe.of(["heads", "mlps"], dtype=dtype, precision="fp32")
    return replace(Request(source, store, model, None, "default", recipe, "cpu", BATCH, None), **changes)


def measure(folder: Path) -> list[Row]:
    cases = [("toy ViT", "toy-vit", 2000, 5), ("ViT-B/32", random_model(folder, "ViT-B-32"), 192, 3)]
    return [_case(folder, *case) for case in cases]


def _case(folder: Path, title: str, name: str, count: int, runs: int) -> Row:
    source = draw(folder / f"scenes-{count}", count)
    store = folder / "throughput-store"
    files = sorted(source.iterdir())
    loaded = load_model(name)

    @torch.no_grad()
    def bare() -> None:
        for start in range(0, len(files), BATCH):
            pixels = [loaded.preprocess(Image.open(file).convert("RGB")) for file in files[start : start + BATCH]]
            loaded.clip.encode_image(torch.stack(pixels))

    plans = []
    for _ in range(runs + 1):
        shutil.rmtree(store, ignore_errors=True)
        plans.append(plan_ingest(request(source, store, name)))

    def whole() -> None:
        shutil.rmtree(store, ignore_errors=True)
        assert run_ingest(plans.pop(), Silent()).stored == count

    pairs = time_pairs(bare, whole, runs=runs)
    rate = 1 / pairs.ratio
    return Row(
        f"rate of `ingest` / bare loop, {title}, {count} scenes",
        ">= 0.85",
        f"{rate:.2f} ({count / median(pairs.second_s):.0f} against {count / median(pairs.first_s):.0f} images/s)",
        rate >= 0.85,
    )
