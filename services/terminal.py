"""What the long commands show on a terminal while they run, and when they are done."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from schemas.recipe import LEVELS, Recipe
from services.sizes import human

if TYPE_CHECKING:
    from workers.ingest import Outcome
    from workers.planning import Plan


def new_console() -> Console:
    """A console that prints text as it is: paths hold brackets, and logs are searched by line."""
    return Console(markup=False, highlight=False, soft_wrap=True)


def ingest_and_show(console: Console, source: Path, store: Path, recipe: Recipe, **options: Any) -> "Outcome":
    """Plans an ingest, shows the plan, runs it and reconciles what was seen.

    Raises:
        SpectrographError: the ingest could not start, or not end.
    """
    with console.status("Loading torch and the model"):
        from services.progress import ingest_progress
        from workers.ingest import run_ingest
        from workers.planning import plan_ingest
        from workers.request import Request

        plan = plan_ingest(Request(source=source, store=store, recipe=recipe, **options))
    _show_plan(console, plan)
    started = time.monotonic()
    with ingest_progress(console, plan.pending_images) as progress:
        outcome = run_ingest(plan, progress)
    seconds = time.monotonic() - started
    if plan.pending:
        rate = plan.pending_images / seconds
        console.print(f"wrote {human(outcome.written_bytes)} in {seconds:.1f} s, {rate:.0f} images/s")
    else:
        console.print("nothing to do: every shard is recorded")
    console.print(f"seen {outcome.seen} = stored {outcome.stored} + failed {outcome.failed}")
    if outcome.failed:
        console.print(f"the reasons: spectrograph info {store} --failures")
    return outcome


def fit_and_show(console: Console, store: Path, sample: int, top_k: int) -> None:
    """Fits a store, keeps the fit there and says what came of it.

    Raises:
        SpectrographError: the store cannot be fitted.
    """
    with console.status("Opening the store"):
        from services.fitting import fit_store
        from services.neurons import Neurons
        from services.progress import count_progress
        from services.store import open_store
        from services.stored import StoredImages
        from workers.shards import add_fit
    stored = StoredImages(open_store(store).folder)
    total = len(Neurons(stored).layers) * stored.manifest.model.neurons
    started = time.monotonic()
    with count_progress(console, "neurons", total) as fitted:
        fit = fit_store(stored, sample, top_k, fitted)
    add_fit(stored.folder, fit)
    if fit.top_k > fit.images // 10:
        console.print(
            f"note     {fit.top_k} of {fit.images} images count as significant for each neuron; the papers take 2%: "
            f"--top-k {max(2, fit.images // 50)}"
        )
    unit = "" if fit.heads else " (% of the representation's norm)"
    table = Table("layer", box=None, pad_edge=False, header_style="bold")
    for column in ("neurons", f"median threshold{unit}", "explained by one direction: median", "10%", "90%"):
        table.add_column(column, justify="right")
    for layer in fit.layers:
        low, middle, high = np.quantile(fit.explained(layer), [0.1, 0.5, 0.9])
        shares = (f"{share:.0%}" for share in (middle, low, high))
        table.add_row(str(layer), str(fit.neurons), f"{np.median(fit.thresholds(layer)):.3g}", *shares)
    console.print(table)
    if fit.heads:
        console.print(f"and {fit.neurons * fit.heads} pairs, each of one direction by construction")
    console.print(
        f"fit {fit.name} of {fit.images} images, the {fit.top_k} largest of each neuron counted, "
        f"in {time.monotonic() - started:.1f} s"
    )


def _show_plan(console: Console, plan: "Plan") -> None:
    from workers.scoring import Scorer

    request, batch, model, recipe = plan.request, plan.batch, plan.manifest.model, plan.manifest.recipe
    done = batch.shards - len(plan.pending)
    lines = {
        "source": f"{request.source}: {batch.images} images",
        "model": f"{model.name}: {model.layers} layers, {model.heads} heads, {model.neurons} neurons, "
        f"{model.dim} dimensions",
        "capture": f"{', '.join(recipe.capture)} as {recipe.dtype}; "
        f"the model runs in {recipe.precision} on {plan.loaded.device}",
        "store": f"{request.store}, batch {request.batch}: {batch.shards} shards of up to {batch.shard_images} images, "
        f"{done} recorded",
        "size": f"{plan.image_bytes(recipe)} bytes per image, {human(plan.pending_bytes)} still to write before "
        f"compression; {human(plan.free_bytes)} free",
    }
    if recipe.layers("neurons"):
        levels = (replace(recipe, level=level) for level in LEVELS)
        lines["neurons"] = f"kept as {recipe.level}; the choices, in bytes per image, all else included: " + ", ".join(
            f"{other.level} {plan.image_bytes(other)}" for other in levels
        )
    if plan.fit is not None:
        held = Scorer.held_bytes(model, recipe)
        lines["scoring"] = f"by the fit {plan.fit.name} of {plan.fit.images} images; it holds {human(held)} in memory"
    for name, text in lines.items():
        console.print(f"{name:8} {text}")
    for note in plan.listing.notes[:3]:
        console.print(f"note     {note}")
    if len(plan.listing.notes) > 3:
        console.print(f"note     and {len(plan.listing.notes) - 3} more like these")


def verify_and_show(console: Console, store: Path, sample: int, device: str) -> bool:
    """Verifies a store, shows what was found, and says whether all is well.

    Raises:
        SpectrographError: the sample could not be encoded.
    """
    with console.status("Loading torch"):
        from services.store import open_store
        from services.verify import verify_checksums, verify_sample
    opened = open_store(store)
    with console.status("Recomputing checksums"):
        sums = verify_checksums(opened.folder)
    console.print(f"read {sums.objects} objects of {sums.shards} shards, {human(sums.bytes)}")
    problems = [*sums.problems]
    if not problems and sample > 0 and opened.images().num_rows:
        with console.status("Encoding a sample anew"):
            found = verify_sample(opened, sample, device)
        problems += found.problems
        missing = f" ({found.unavailable} more are gone or changed)" if found.unavailable else ""
        console.print(f"encoded {found.images} images anew{missing}")
        if found.images:
            console.print(f"largest difference from the stored output: {found.representation:.1e}")
        if found.total is not None:
            console.print(f"largest difference from the sum of contributions: {found.total:.1e}")
        if found.neurons is not None and opened.manifest.recipe.level == "significant":
            console.print("significant scores were checked by their checksums alone")
        elif found.neurons is not None:
            console.print(f"largest difference from the stored neurons: {found.neurons:.1e}")
    for problem in problems:
        console.print(f"problem: {problem}")
    counted = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    console.print(counted if problems else "all is well")
    return not problems
