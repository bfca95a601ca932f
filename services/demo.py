"""The main job end to end on the toy world: scenes, store, checks, and what the heads turn out to see."""

import time
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from schemas.components import Component
from schemas.errors import PlanError
from schemas.recipe import Recipe
from services.demo_page import write_page
from services.roles import Retrieval, Task, ablation_losses, best_retrieval
from services.store import open_store
from services.terminal import ingest_and_show, verify_and_show
from workers.models import load_model
from workers.toyworld.attributes import VALUES, World, prompts
from workers.toyworld.scenes import scene

MODEL: Final = "toy-vit"
NEIGHBOURS: Final = 8
_SEED: Final = 7  # scenes that no model was trained on
_MARK: Final = "This folder was made by 'spectrograph demo'.\n"


def run_demo(console: Console, folder: Path, count: int) -> None:
    """Draws ``count`` scenes, ingests and verifies them, and shows what each head is for.

    Raises:
        PlanError: the folder holds something else, or there are too few scenes to say anything.
    """
    started = time.monotonic()
    if count < 100:
        raise PlanError(f"{count} scenes are too few to say anything: draw at least 100")
    images, place = folder / "images", folder / "store"
    _draw(console, folder, images, count)
    console.print(f"\n$ spectrograph ingest {images} {place} --model {MODEL}", style="bold")
    recipe = Recipe.of(["heads", "mlps"], dtype="float16", precision="fp32")
    ingest_and_show(
        console,
        images,
        place,
        recipe,
        model=MODEL,
        pretrained=None,
        batch="default",
        device="auto",
        batch_size=32,
        shard_images=None,
    )
    console.print(f"\n$ spectrograph verify {place}", style="bold")
    verify_and_show(console, place, 16, "cpu")
    _show_findings(console, folder, place)
    console.print(f"\ndone in {time.monotonic() - started:.0f} s; look at {folder / 'index.html'}")


def _draw(console: Console, folder: Path, images: Path, count: int) -> None:
    """Draws the scenes that are not there yet, one sub-folder per shape, with the truth in ``metadata.parquet``."""
    mark = folder / "MADE-BY-SPECTROGRAPH"
    if folder.exists() and any(folder.iterdir()) and not mark.is_file():
        raise PlanError(f"{folder} holds something else: name another folder for the demo")
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(_MARK)
    truths = []
    for index in track(
        range(count), "Drawing scenes", console=console, transient=True, disable=not console.is_terminal
    ):
        drawn = scene(World(), seed=_SEED, index=index)
        name = f"{drawn.attributes.shape}/{index:05d}.png"
        truths.append({"file_name": name, "caption": drawn.attributes.caption(), **drawn.attributes.labels()})
        file = images / name
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn.picture).save(file)
    pq.write_table(pa.Table.from_pylist(truths), images / "metadata.parquet")
    console.print(f"drew {count} scenes of {', '.join(VALUES)} into {images}")


def _show_findings(console: Console, folder: Path, place: Path) -> None:
    store = open_store(place)
    model = load_model(MODEL)
    table = store.images()
    tasks = [
        Task(name, model.encode_texts(list(prompts(name).values())), _truth(table, name))
        for name in ("shape", "colour", "background")
    ]
    whole = store.representation()
    losses = ablation_losses(store, tasks)
    retrievals = {task.name: best_retrieval(store, task.truth, NEIGHBOURS) for task in tasks}
    console.print("\nWhat the store knows", style="bold")
    console.print(_findings(whole, tasks, losses, retrievals))
    write_page(folder, store, tasks, losses, retrievals)


def _truth(table: pa.Table, name: str) -> np.ndarray:
    return np.array([VALUES[name].index(value) for value in table[name].to_pylist()], np.intp)


def _findings(
    whole: np.ndarray,
    tasks: list[Task],
    losses: dict[Component, dict[str, float]],
    retrievals: dict[str, Retrieval],
) -> Table:
    table = Table(
        "attribute", "zero-shot (chance)", "the component that matters most", "the head that sorts by it", box=None
    )
    for task in tasks:
        worst = max(losses, key=lambda component: losses[component][task.name])
        loss = losses[worst][task.name]
        found = retrievals[task.name]
        table.add_row(
            task.name,
            f"{task.accuracy(whole):.1%} ({task.chance:.1%})",
            f"{worst}: {loss:.1%} lost without it",
            f"{found.head}: {found.precision:.0%} of the {NEIGHBOURS} nearest images share it",
        )
    return table
