"""Bytes on disk, what rounding costs, and memory."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from schemas.store import StoreFolder
from services.store import open_store
from tests.bench.table import Row
from tests.bench.throughput import Silent, draw, random_model, request
from workers.decoding import decode_image
from workers.ingest import run_ingest
from workers.planning import plan_ingest

IMAGES = 192


def measure(folder: Path) -> list[Row]:
    return [*_disk(folder), _memory(folder)]


def _disk(folder: Path) -> list[Row]:
    model = random_model(folder, "ViT-B-32")
    source = draw(folder / f"scenes-{IMAGES}", IMAGES)
    rows = []
    for dtype, most in (("float16", 1e-3), ("float32", 1e-6)):
        asked = request(source, folder / f"footprint-{dtype}", model, dtype)
        plan = plan_ingest(asked)
        run_ingest(plan, Silent())
        if dtype == "float16":
            rows.append(_bytes(asked.store))
        away = _away(plan, asked.store)
        what = (
            f"rebuilt head contributions against the direct computation, ViT-B/32, {dtype}: largest relative difference"
        )
        rows.append(Row(what, f"<= {most:.0e}", f"{away:.1e}", away <= most))
    return rows


def _bytes(store: Path) -> Row:
    folder = StoreFolder.open(store)
    size = sum(folder.digests("default", shard)["heads"].bytes for shard in folder.shards("default"))
    model = folder.manifest.model
    dense = IMAGES * model.layers * model.heads * model.dim * 4
    return Row(
        "bytes on disk, ViT-B/32 heads / dense float32 of the references",
        "<= 1/14",
        f"1/{dense / size:.1f} ({size / IMAGES:.0f} bytes per image)",
        size * 14 <= dense,
    )


def _away(plan: object, store: Path) -> float:
    """Stored contributions against ``(u W_O) * gamma / sigma @ P`` of what the same forward pass read, in float64."""
    decomposition = plan.decomposition
    count = 32  # one batch of the ingest
    images = [decode_image(plan.listing.place(row), plan.loaded.preprocess).pixels for row in range(count)]
    read: list[torch.Tensor] = []
    stock = decomposition._coefficients

    def spied(trace: object, pooled: object) -> dict[str, torch.Tensor]:
        read.extend(heads[:, 0].double() * pooled.weights[:, 0].double() for heads in trace.heads)
        return stock(trace, pooled)

    decomposition._coefficients = spied
    decomposition.encode(torch.stack(images))
    vision, worst = decomposition.vision, 0.0
    after = vision.ln_post.weight.detach().double()[:, None] * vision.proj.detach().double()
    rebuilt = open_store(store).heads()[:count]
    for layer, block in enumerate(vision.transformer.resblocks):
        heads = block.attn.attention.num_heads
        output = block.attn.attention.out_proj.weight.detach().double().T.unflatten(0, (heads, -1))  # (H, E, W)
        direct = torch.einsum("nhe,hew->nhw", read[layer].unflatten(1, (heads, -1)), output) @ after  # (N, H, D)
        away = np.linalg.norm(rebuilt[:, layer] - direct.numpy(), axis=-1) / np.linalg.norm(direct.numpy(), axis=-1)
        worst = max(worst, float(away.max()))
    return worst


PEAK = """
import sys
from pathlib import Path
from tests.bench.throughput import Silent, request
from workers.ingest import run_ingest
from workers.planning import plan_ingest
outcome = run_ingest(plan_ingest(request(Path(sys.argv[1]), Path(sys.argv[2]), "toy-vit")), Silent())
status = Path("/proc/self/status").read_text()  # getrusage would tell the peak of the process that started this one
print(outcome.stored, next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


def _memory(folder: Path) -> Row:
    """Peak memory of whole processes; the larger folder holds the smaller one's files ten times."""
    few = draw(folder / "scenes-2000", 2000)
    many = folder / "scenes-20000"
    for file in few.iterdir():
        for copy in range(10):
            (many / str(copy)).mkdir(parents=True, exist_ok=True)
            os.link(file, many / str(copy) / file.name)
    peaks = {}
    for source, count in ((few, 2000), (many, 20_000)):
        command = [sys.executable, "-c", PEAK, str(source), str(folder / f"memory-{count}")]
        stored, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        assert int(stored) == count
        peaks[count] = int(peak) / 1024
    ratio = peaks[20_000] / peaks[2000]
    measured = f"{ratio:.3f} ({peaks[20_000]:.0f} MiB against {peaks[2000]:.0f} MiB)"
    return Row("peak memory, 20,000 images / 2,000 images, toy ViT", "<= 1.10", measured, ratio <= 1.10)
