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
from schemas.errors import DamagedStoreError, PlanError
from schemas.recipe import Recipe
from services.demo_page import Findings, write_page
from services.roles import Retrieval, Selective, Task, ablation_losses, best_retrieval, most_selective
from services.store import open_store
from services.terminal import fit_and_show, ingest_and_show, verify_and_show
from workers.models import load_model
from workers.staging import refusals
from workers.toyworld.attributes import VALUES, World, prompts
from workers.toyworld.scenes import scene

MODEL: Final = "toy-vit"
PAIRS_MODEL: Final = "toy-resnet"
NEIGHBOURS: Final = 8
SELECTIVE: Final = 3
_SEED: Final = 7  # scenes that no model was trained on


def run_demo(console: Console, folder: Path, count: int) -> None:
    """Draws ``count`` scenes, ingests and verifies them, and shows what heads, neurons and pairs are for.

    Raises:
        PlanError: the folder holds something else, or there are too few scenes to say anything.
    """
    started = time.monotonic()
    if count < 100:
        raise PlanError(f"{count} scenes are too few to say anything: draw at least 100")
    images, place, pairs = folder / "images", folder / "store", folder / "pairs"
    _check_folder(folder, count)
    _draw(console, images, count)
    for store, model, capture in ((place, MODEL, ["heads", "mlps", "neurons:all"]), (pairs, PAIRS_MODEL, ["pairs"])):
        _ingest(console, images, store, model, capture)
        top_k = count // 50
        console.print(f"\n$ spectrograph fit {store} --top-k {top_k}", style="bold")
        fit_and_show(console, store, count, top_k)
    _show_findings(console, folder, place, pairs)
    console.print(f"\ndone in {time.monotonic() - started:.0f} s; look at {folder / 'index.html'}")


def _ingest(console: Console, images: Path, store: Path, model: str, capture: list[str]) -> None:
    command = f"spectrograph ingest {images} {store} --model {model} --capture {','.join(capture)}"
    console.print(f"\n$ {command}", style="bold")
    ingest_and_show(
        console,
        images,
        store,
        Recipe.of(capture, dtype="float16", precision="fp32"),
        model=model,
        pretrained=None,
        batch="default",
        device="auto",
        batch_size=32,
        shard_images=None,
    )
    console.print(f"\n$ spectrograph verify {store}", style="bold")
    if not verify_and_show(console, store, 16, "cpu"):
        raise DamagedStoreError(f"{store} is damaged: remove it and run the demo again")


def _check_folder(folder: Path, count: int) -> None:
    """Marks the folder as the demo's own, unless it is somebody's."""
    mark, made = folder / "MADE-BY-SPECTROGRAPH", f"spectrograph demo --images {count}\n"
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not mark.is_file()):
        raise PlanError(f"{folder} holds something else: name another folder for the demo")
    if mark.is_file() and mark.read_text() != made:
        raise PlanError(f"{folder} holds another demo ({mark.read_text().strip()}): name another folder, or remove it")
    with refusals(folder):
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(made)


def _draw(console: Console, images: Path, count: int) -> None:
    """Draws the scenes that are not there yet, one sub-folder per shape, with the truth in ``metadata.parquet``."""
    truths = []
    for index in track(range(count), "Drawing", console=console, transient=True, disable=not console.is_terminal):
        drawn = scene(World(), seed=_SEED, index=index)
        name = f"{drawn.attributes.shape}/{index:05d}.png"
        truths.append({"file_name": name, "caption": drawn.attributes.caption(), **drawn.attributes.labels()})
        file = images / name
        if not file.is_file():
            with refusals(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                private = file.with_name(f".{file.name}")
                Image.fromarray(drawn.picture).save(private, "PNG")
                private.replace(file)
    with refusals(images):
        pq.write_table(pa.Table.from_pylist(truths), images / "metadata.parquet")
    console.print(f"drew {count} scenes of {', '.join(VALUES)} into {images}")


def _show_findings(console: Console, folder: Path, place: Path, pairs: Path) -> None:
    store, resnet = open_store(place), open_store(pairs)
    model = load_model(MODEL)
    table = store.images()
    other = load_model(PAIRS_MODEL)
    tasks, pair_tasks = (
        [
            Task(name, encoder.encode_texts(list(prompts(name).values())), _truth(table, name))
            for name in ("shape", "colour", "background")
        ]
        for encoder in (model, other)
    )
    whole = store.representation()
    losses = ablation_losses(store, tasks)
    retrievals = {task.name: best_retrieval(store, task.truth, NEIGHBOURS) for task in tasks}
    console.print("\nWhat the store knows of heads and MLPs", style="bold")
    console.print(_findings(whole, tasks, losses, retrievals))
    selective = {task.name: most_selective(store, task, SELECTIVE) for task in tasks}
    selective_pairs = {task.name: most_selective(resnet, task, SELECTIVE) for task in pair_tasks}
    console.print("\nWhat single neurons and pairs are significant for", style="bold")
    console.print(_selective(tasks, selective, selective_pairs))
    console.print(" (A direction is where the effect points. A neuron may speak against what it is significant for.)")
    write_page(folder, store, tasks, Findings(losses, retrievals, selective, selective_pairs))


def _truth(table: pa.Table, name: str) -> np.ndarray:
    return np.array([VALUES[name].index(value) for value in table[name].to_pylist()], np.intp)


def _findings(
    whole: np.ndarray,
    tasks: list[Task],
    losses: dict[Component, dict[str, float]],
    retrievals: dict[str, Retrieval],
) -> Table:
    table = Table("attribute", "zero-shot (chance)", "lost without", f"alike: {NEIGHBOURS} nearest by", box=None)
    for task in tasks:
        worst = max(losses, key=lambda component: losses[component][task.name])
        loss = losses[worst][task.name]
        found = retrievals[task.name]
        table.add_row(
            task.name,
            f"{task.accuracy(whole):.1%} ({task.chance:.1%})",
            f"{worst}: {loss:.1%}",
            f"{found.head}: {found.precision:.0%} share it",
        )
    return table


def _selective(tasks: list[Task], neurons: dict[str, list[Selective]], pairs: dict[str, list[Selective]]) -> Table:
    table = Table("attribute", "component", "its significant images", "the text along its direction", box=None)
    for task in tasks:
        values = VALUES[task.name]
        for one in (*neurons[task.name][:1], *pairs[task.name][:1]):
            shared = f"{one.share:.0%} of {len(one.images)} are {values[one.value]}"
            table.add_row(task.name, str(one.component), shared, values[one.named])
    return table
