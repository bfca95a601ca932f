"""What neurons and pairs cost: time beside a plain forward pass, bytes beside dense vectors, a fit, and memory."""

import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import open_clip
import torch

from schemas.fits import Fit
from schemas.recipe import Recipe
from schemas.store import StoreFolder
from services.fitting import fit_neurons, fit_store
from services.stored import StoredImages
from tests.bench.pairs import Pairs, time_pairs
from tests.bench.table import Row
from tests.bench.throughput import Silent, draw, random_model, request
from workers.decomposition import Decomposition
from workers.effects import blocks, effects_of, factors
from workers.ingest import run_ingest
from workers.planning import plan_ingest
from workers.resnet import ResnetDecomposition
from workers.shards import add_fit
from workers.vit import VitDecomposition

BATCH = 16
RUNS = 25
FIT_IMAGES = 2000


def measure(folder: Path) -> list[Row]:
    return [*_capture(), *_bytes_and_fit(folder), *_memory(folder)]


def _capture() -> list[Row]:
    torch.manual_seed(0)
    vit = open_clip.create_model("ViT-B-32", load_weights=False, pretrained_text=False).eval()
    one = VitDecomposition(deepcopy(vit.visual), _recipe("heads", "mlps", "neurons:9"))
    rows = [_timed("heads, mlps, neurons of layer 9, ViT-B/32", vit, one, 1.15)]
    every = VitDecomposition(deepcopy(vit.visual), _recipe("heads", "mlps", "neurons:all"))
    rows.append(_timed("heads, mlps, coefficients of all 11 layers, ViT-B/32", vit, every, None))
    fit = _fit(every, torch.randn(BATCH, 3, 224, 224))
    recipe = _recipe("heads", "mlps", "neurons:all", level="scores")
    scored = VitDecomposition(deepcopy(vit.visual), recipe)
    scored.score_by(fit)
    rows.append(_timed("heads, mlps, scores of all 11 layers, ViT-B/32", vit, scored, 1.40))
    rn50 = open_clip.create_model("RN50", load_weights=False).eval()
    pairs = ResnetDecomposition(deepcopy(rn50.visual), _recipe("pairs"))
    return [*rows, _timed("pairs, RN50", rn50, pairs, 1.25)]


def _timed(what: str, model: torch.nn.Module, decomposition: Decomposition, most: float | None) -> Row:
    images = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def plain() -> torch.Tensor:
        return model.encode_image(images)

    pairs: Pairs = time_pairs(plain, lambda: decomposition.encode(images), runs=RUNS, warm_up=3)
    return Row(
        f"capture of {what} / plain `encode_image`, batch {BATCH}",
        f"<= {most:.2f}" if most else "-",
        f"{pairs.ratio:.3f} ({pairs.spread})",
        most is None or pairs.ratio <= most,
    )


def _fit(decomposition: VitDecomposition, images: torch.Tensor) -> Fit:
    """A fit of so few images has the size, and so the cost, of any other."""
    found = decomposition.encode(images)
    norms = found["representation"].norm(dim=1).numpy()
    layers, arrays = decomposition.recipe.layers("neurons"), {}
    for layer in layers:
        effects = effects_of(decomposition.sizes, decomposition.recipe, decomposition.basis, layer)
        numbers = 100 * found[f"neurons_{layer}"].flatten(2).double().numpy() / norms[:, None, None]  # (S, N, R)
        for name in ("means", "directions"):
            arrays[f"{name}_{layer}"] = np.empty(numbers.shape[1:], np.float32)
        for block in blocks(len(effects), 8 * numbers.shape[2] ** 2):
            fitted = fit_neurons(
                numbers[:, block].swapaxes(0, 1), factors(effects, np.arange(block.start, block.stop)), BATCH // 2
            )
            arrays[f"means_{layer}"][block] = fitted.means
            arrays[f"directions_{layer}"][block] = fitted.directions
    sizes = decomposition.sizes
    counts = tuple((sizes.layers - 1 - layer) * sizes.heads for layer in layers)
    return Fit("m", "s", BATCH, BATCH // 2, "now", layers, sizes.neurons, counts, 0, arrays)


def _bytes_and_fit(folder: Path) -> list[Row]:
    vit, rn50 = random_model(folder, "ViT-B-32"), random_model(folder, "RN50")
    source = draw(folder / f"scenes-{FIT_IMAGES}", FIT_IMAGES)
    whole = _ingest(folder, "coefficients", source, vit, _recipe("neurons:9"))
    started = time.perf_counter()
    fit = fit_store(StoredImages(whole), FIT_IMAGES, 100)
    seconds = time.perf_counter() - started
    add_fit(whole, fit)
    few = draw(folder / "scenes-192", 192)
    scores = _ingest(folder, "scores", few, vit, _recipe("neurons:9", level="scores"), fit=whole.path)
    significant = _ingest(folder, "significant", few, vit, _recipe("neurons:9", level="significant"), fit=whole.path)
    pairs = _ingest(folder, "pairs", few, rn50, _recipe("pairs"))
    return [
        Row(
            f"fit of layer 9 of ViT-B/32 from the coefficients of {FIT_IMAGES} images",
            "< 60 s",
            f"{seconds:.1f} s",
            seconds < 60,
        ),
        _bytes("coefficients of layer 9 of ViT-B/32", whole, ("neurons_9",), FIT_IMAGES, 40),
        _bytes("scores of layer 9 of ViT-B/32", scores, ("neuron_norms", "neuron_projections"), 192, 500),
        _bytes("significant scores of layer 9 of ViT-B/32", significant, ("significant",), 192, None),
        _bytes("pairs of RN50", pairs, ("pairs",), 192, 2000),
    ]


def _ingest(
    folder: Path, name: str, source: Path, model: str, recipe: Recipe, *, fit: Path | None = None
) -> StoreFolder:
    asked = request(source, folder / name, model, recipe=recipe, fit=fit)
    run_ingest(plan_ingest(asked), Silent())
    return StoreFolder.open(asked.store)


def _bytes(what: str, folder: StoreFolder, parts: tuple[str, ...], images: int, least: int | None) -> Row:
    digests = [folder.digests("default", shard) for shard in folder.shards("default")]
    size = sum(digest[part].bytes for digest in digests for part in parts)
    model = folder.manifest.model
    vectors = model.neurons * (model.heads if model.family == "resnet" else 1)
    dense = images * vectors * model.dim * 4
    raw = images * sum(folder.specs[part].image_bytes for part in parts if part in folder.specs)
    before = f"; 1/{dense / raw:.0f} before compression, which does well on untrained weights" if raw else ""
    return Row(
        f"bytes on disk, {what} / dense float32",
        f"<= 1/{least}" if least else "-",
        f"1/{dense / size:.0f} ({size / images:.0f} bytes per image{before})",
        least is None or size * least <= dense,
    )


PEAK = """
import sys
from pathlib import Path
from schemas.recipe import Recipe
from tests.bench.throughput import Silent, request
from workers.ingest import run_ingest
from workers.planning import plan_ingest
source, store, model, shard, capture = sys.argv[1:]
recipe = Recipe.of(capture.split(","), dtype="float16", precision="fp32")
asked = request(Path(source), Path(store), model, recipe=recipe, shard_images=int(shard))
outcome = run_ingest(plan_ingest(asked), Silent())
status = Path("/proc/self/status").read_text()
print(outcome.stored, next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


def _memory(folder: Path) -> list[Row]:
    few = draw(folder / "scenes-1000", 1000)
    many = folder / "scenes-10000"
    for file in few.iterdir():
        for copy in range(10):
            (many / str(copy)).mkdir(parents=True, exist_ok=True)
            (many / str(copy) / file.name).hardlink_to(file)
    small, large = (_peak(folder, source, "toy-vit", 256, "heads,mlps,neurons:all") for source in (few, many))
    rows = [
        Row(
            "peak memory, 10,000 images / 1,000 images, toy ViT, coefficients of all layers",
            "<= 1.10",
            f"{large / small:.3f} ({large:.0f} MiB against {small:.0f} MiB)",
            large <= 1.10 * small,
        )
    ]
    vit, images = random_model(folder, "ViT-B-32"), draw(folder / "scenes-192", 192)
    for capture in ("heads,mlps", "heads,mlps,neurons:9", "heads,mlps,neurons:all"):
        peak = _peak(folder, images, vit, 32, capture)
        rows.append(
            Row(f"peak memory, ViT-B/32, batch 32, shards of 32, {capture}", "-", f"{peak:.0f} MiB", holds=True)
        )
    return rows


def _peak(folder: Path, source: Path, model: str, shard: int, capture: str) -> float:
    store = folder / f"peak-{source.name}-{capture}"
    command = [sys.executable, "-c", PEAK, str(source), str(store), model, str(shard), capture]
    _, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(peak) / 1024


def _recipe(*capture: str, level: str = "coefficients") -> Recipe:
    return Recipe.of(capture, dtype="float16", precision="fp32", level=level)
