"""What a store says of itself, for a person."""

from collections import Counter

from rich.console import Console
from rich.table import Table

from schemas.recipe import LEVELS
from services.sizes import human
from services.store import Store


def show_info(console: Console, store: Store) -> None:
    """Prints how the store was made, its batches and its arrays."""
    manifest, model, recipe = store.manifest, store.manifest.model, store.manifest.recipe
    writer = manifest.libraries.get("spectrograph", "of an unknown version")
    weights = f"{model.name} {model.pretrained or ''}".strip()
    lines = {
        "store": f"{store.folder.path}, made {manifest.created} by spectrograph {writer}",
        "model": f"{weights}, weights {model.fingerprint[:12]}",
        "parts": f"{model.layers} layers of {model.heads} heads and an MLP of {model.neurons} neurons; "
        f"{model.dim} dimensions"
        if model.family == "vit"
        else f"{model.neurons} neurons read by {model.heads} heads; {model.dim} dimensions",
        "recipe": f"{', '.join(recipe.capture)} as {recipe.dtype}, model in {recipe.precision}",
    }
    if recipe.layers("neurons"):
        made = f" by the fit {recipe.fit}" if recipe.fit else ""
        lines["neurons"] = f"kept as {recipe.level}{made}: {LEVELS[recipe.level]}"
    for name in store.fits():
        fit = store.folder.fit_description(name)
        lines[f"fit {name}"] = (
            f"of {fit.images} images, the {fit.top_k} largest of each neuron, made {fit.created[:19]}"
        )
    for name, text in lines.items():
        console.print(f"{name:8} {text}")
    console.print(_batches(store))
    console.print(_arrays(store))


def show_failures(console: Console, store: Store) -> None:
    """Prints each image that could not be stored, with its reason, and how often each reason occurred."""
    rows = store.failures().to_pylist()
    for row in rows:
        console.print(f"{row['source']}: {row['error']}")
    counted = Counter(row["error"] for row in rows).most_common()
    for reason, count in counted if len(counted) < len(rows) else []:
        console.print(f"{count} x {reason}")
    console.print(f"{len(rows)} failed")


def _batches(store: Store) -> Table:
    table = Table("batch", "source", box=None, pad_edge=False, header_style="bold")
    for column in ("images", "stored", "failed", "shards", "bytes"):
        table.add_column(column, justify="right")
    stored = Counter(store.images()["batch"].to_pylist())
    failed = Counter(store.failures()["batch"].to_pylist())
    for name in store.batches():
        batch, shards = store.folder.batch(name), store.folder.shards(name)
        size = sum(d.bytes for shard in shards for d in store.folder.digests(name, shard).values())
        complete = f"{len(shards)} of {batch.shards}"
        table.add_row(name, batch.source, *map(str, (batch.images, stored[name], failed[name], complete)), human(size))
    return table


def _arrays(store: Store) -> Table:
    table = Table("array", "dimensions after the image", box=None, pad_edge=False, header_style="bold")
    table.add_column("bytes per image", justify="right")
    for name, spec in store.folder.specs.items():
        sizes = ", ".join(f"{dim} {size}" for dim, size in zip(spec.dims, spec.shape, strict=True))
        table.add_row(name, f"{sizes} ({spec.dtype})", str(spec.image_bytes))
    return table
