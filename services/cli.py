"""The ``spectrograph`` command. Heavy libraries are loaded by the command that needs them, not by ``--help``."""

import signal
import sys
from pathlib import Path
from typing import Any

import click

from schemas.errors import SpectrographError
from schemas.recipe import CAPTURES, DTYPES, LAYERED, LEVELS, PRECISIONS, Recipe
from services.terminal import fit_and_show, ingest_and_show, new_console, verify_and_show

_INTERRUPTED = 128 + signal.SIGINT


def main() -> None:
    """Runs the command line; what a user can mend is one sentence, what we must mend keeps its traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends as Ctrl-C does
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:  # what click makes of Ctrl-C
        _fail("interrupted; what was recorded is safe: run the same command again", _INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except SpectrographError as error:
        _fail(str(error), 1)


def _fail(message: str, code: int) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="spectrograph")
def cli() -> None:
    """Cache what each part of a CLIP image encoder adds to the representation of each image."""


@cli.command(short_help="Encode images and write contributions to a store.")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--model", required=True, metavar="NAME", help="A name that open_clip knows, hf-hub:OWNER/REPO, a folder, toy-vit."
)
@click.option("--pretrained", metavar="TAG_OR_FILE", help="For a name that open_clip knows: which weights.")
@click.option("--batch", default="default", show_default=True, metavar="NAME", help="Which group the images form.")
@click.option(
    "--capture",
    default="heads,mlps",
    show_default=True,
    metavar="A,B",
    help=f"Among {', '.join(CAPTURES)}; {' and '.join(LAYERED)} with their layers, as in neurons:8-10, neurons:1+4 or "
    "neurons:all; of a ResNet, pairs.",
)
@click.option(
    "--neurons",
    "level",
    default="coefficients",
    show_default=True,
    type=click.Choice(list(LEVELS)),
    help="What to keep of neurons: all that rebuilds their contributions; or, with --fit, two scores each; or those "
    "of significant images alone.",
)
@click.option(
    "--fit",
    type=click.Path(path_type=Path),
    metavar="STORE",
    help="The store of the same model whose latest fit makes the scores.",
)
@click.option(
    "--dtype", default="float16", show_default=True, type=click.Choice(DTYPES), help="How numbers are stored."
)
@click.option(
    "--precision", default="fp32", show_default=True, type=click.Choice(PRECISIONS), help="How the model runs."
)
@click.option("--device", default="auto", show_default=True, help="Where the model runs, as torch calls it.")
@click.option(
    "--shard-images", type=int, metavar="N", help="Images written and resumed as one. [default: as fit 256 MiB]"
)
@click.option("--batch-size", default=32, show_default=True, metavar="N", help="Images encoded at once.")
@click.option("--force", is_flag=True, help="Start also where the disk seems too small.")
def ingest(source: Path, store: Path, **options: Any) -> None:
    """Encode the images of SOURCE and write their contributions to STORE.

    SOURCE is a folder (sub-folders become labels; the columns of a metadata.csv or metadata.parquet with a file_name
    column are kept), WebDataset tars like 'shard-{000..999}.tar', Parquet files that hold images, or a CSV or Parquet
    list of files. Run again, the same command goes on where it stopped.
    """
    capture = [name.strip() for name in options.pop("capture").split(",") if name.strip()]
    kept = {name: options.pop(name) for name in ("dtype", "precision", "level")}
    recipe = Recipe.of(capture, **kept)
    ingest_and_show(new_console(), source, store, recipe, **options)


@cli.command(short_help="Say what a store holds.")
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--failures", is_flag=True, help="List the images that could not be stored, and why.")
def info(store: Path, failures: bool) -> None:
    """Say what STORE holds and how it was made."""
    from services.info import show_failures, show_info
    from services.store import open_store

    opened = open_store(store)
    show_failures(new_console(), opened) if failures else show_info(new_console(), opened)


@cli.command(short_help="Check a store against its checksums and model.")
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--sample", default=16, show_default=True, metavar="N", help="Images to encode anew; 0 for none.")
@click.option("--device", default="cpu", show_default=True, help="Where to encode them.")
def verify(store: Path, sample: int, device: str) -> None:
    """Recompute the checksums of STORE, encode some images anew, and check that contributions sum to the output."""
    from services.store import open_store

    console = new_console()
    opened = open_store(store)
    if not verify_and_show(console, opened.folder.path, sample, device):
        raise SpectrographError(f"{store} is damaged: mend what is named, or ingest its images into a new store")


@cli.command(short_help="Learn what the neurons of a store do.")
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--sample", default=5000, show_default=True, metavar="N", help="Images to learn from, at most.")
@click.option(
    "--top-k", default=100, show_default=True, metavar="N", help="Images of each neuron that count as significant."
)
def fit(store: Path, sample: int, top_k: int) -> None:
    """Learn what the neurons and pairs in STORE do on average, from where on they matter, and in which direction.

    The fit is kept in STORE, which then answers with norms and projections. For a transformer's neurons, a larger
    ingest with --neurons scores --fit STORE keeps those alone. As a rule of thumb, --top-k is 2% of the images.
    """
    fit_and_show(new_console(), store, sample, top_k)


@cli.command(short_help="Remove a batch from a store.")
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--batch", required=True, metavar="NAME", help="Which batch.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def drop(store: Path, batch: str, yes: bool) -> None:
    """Remove a batch from STORE, with all that was computed of its images; their files stay where they are."""
    from schemas.store import StoreFolder
    from services.sizes import human
    from workers.shards import drop_batch

    folder = StoreFolder.open(store)
    images = folder.batch(batch).images
    shards = folder.shards(batch)
    size = sum(digest.bytes for shard in shards for digest in folder.digests(batch, shard).values())
    if not yes and not click.confirm(f"Remove batch {batch!r} of {images} images, {human(size)}, from {store}?"):
        raise SpectrographError("nothing was removed")
    drop_batch(folder, batch)
    click.echo(f"removed batch {batch!r} of {images} images, {human(size)}")


@cli.command(short_help="Try it all on a small drawn world.")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("demo"))
@click.option("--images", default=1200, show_default=True, metavar="N", help="Scenes to draw.")
def demo(folder: Path, images: int) -> None:
    """Draw a small world, ingest it, and find out which heads see shape, colour and background.

    Everything is put into FOLDER (by default, demo), a page to look at included. No network is needed.
    """
    from services.demo import run_demo

    run_demo(new_console(), folder, images)
