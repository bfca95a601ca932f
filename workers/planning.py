"""What an ingest would do, worked out before anything is written: the source listed, the model loaded, all compared."""

import math
import platform
import shutil
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final

import pyarrow as pa
import torch

from schemas.errors import DamagedStoreError, PlanError, SourceError, StoreMismatchError, UnsupportedModelError
from schemas.fits import Fit
from schemas.layout import (
    BASIS,
    BATCHES,
    FITS,
    SIGNIFICANT_BYTES,
    STAGING,
    array_specs,
    basis_specs,
    check_batch_name,
    dense_specs,
    image_bytes,
    shard_images,
)
from schemas.manifest import Batch, Manifest, Model, Sizes
from schemas.recipe import Recipe
from schemas.store import StoreFolder
from workers.decomposition import Decomposition
from workers.fit_planning import check_scoring, checked_fit, find_fit
from workers.models import LoadedModel, load_model
from workers.request import Request
from workers.sources.listing import Listing
from workers.sources.opening import list_source
from workers.towers import decompose
from workers.vit import VitDecomposition

_DEVICES: Final = ("cpu", "cuda", "mps")
_SIGNIFICANT_SHARE: Final = 0.02  # of the images, as in the papers, where no fit says it
_LIBRARIES: Final = ("spectrograph", "torch", "open_clip_torch", "zarr", "numcodecs", "pyarrow", "pillow")


@dataclass(frozen=True)
class Plan:
    """What an ingest would do; nothing is written yet."""

    request: Request
    listing: Listing
    loaded: LoadedModel
    decomposition: Decomposition
    fit: Fit | None
    manifest: Manifest
    batch: Batch
    pending: tuple[int, ...]  # shards that are not recorded yet
    is_new_store: bool
    is_new_batch: bool

    def image_bytes(self, recipe: Recipe) -> int:
        """Bytes of one image in all arrays, uncompressed; significant scores as many as the fit lets expect."""
        size = image_bytes(array_specs(self.manifest.model, recipe))
        if recipe.level != "significant":
            return size
        share = self.fit.top_k / self.fit.images if self.fit else _SIGNIFICANT_SHARE
        scores = len(recipe.layers("neurons")) * self.manifest.model.neurons
        return size + int(share * scores * SIGNIFICANT_BYTES)

    @property
    def pending_bytes(self) -> int:
        """What the pending shards, and the basis of a new store, take on disk before compression."""
        model, recipe = self.manifest.model, self.manifest.recipe
        static = sum(4 * math.prod(spec.shape) for spec in basis_specs(model, recipe)) if self.is_new_store else 0
        return static + self.pending_images * self.image_bytes(recipe)

    @property
    def free_bytes(self) -> int:
        """What is free on the disk of the store."""
        store = self.request.store.resolve()
        return shutil.disk_usage(next(folder for folder in (store, *store.parents) if folder.is_dir())).free

    @property
    def pending_images(self) -> int:
        """Images in the pending shards."""
        return sum(len(self.batch.rows(shard)) for shard in self.pending)


def plan_ingest(request: Request) -> Plan:
    """Lists the source, loads the model and compares both with the store: what is cheap to find wrong comes first.

    Raises:
        PlanError, SourceError, ModelError, StoreError: the ingest could not end well, and why.
    """
    _check(request)
    device = _device(request.device)
    folder = _open(request.store)
    listing = list_source(request.source)
    digest = listing.digest()
    known = folder is not None and request.batch in folder.batch_names()
    recipe = request.recipe
    if folder is not None:
        _check_columns(folder, listing)
        recipe = replace(_resolved(recipe, folder), fit=folder.manifest.recipe.fit)
        _check_same(request, folder.manifest.recipe_differences(recipe))
    scoring = find_fit(request, folder)
    if folder is not None and known:
        _check_batch(folder, request, digest, len(listing))
    loaded = load_model(request.model, request.pretrained, device=device)
    if folder is not None:
        _check_same(request, folder.manifest.model_differences(loaded.fingerprint, loaded.config, loaded.preprocessing))
    fit = checked_fit(scoring, request, loaded) if scoring else None
    recipe = replace(recipe, fit=fit.name if fit else None)
    decomposition = _decomposition(request, recipe, loaded, folder, fit)
    model = _describe(loaded, decomposition.sizes)
    manifest = folder.manifest if folder else _manifest(model, decomposition.recipe)
    batch = folder.batch(request.batch) if folder and known else _new_batch(request, manifest, digest, len(listing))
    done = set(folder.shards(request.batch)) if folder and known else set()
    pending = tuple(shard for shard in range(batch.shards) if shard not in done)
    plan = Plan(request, listing, loaded, decomposition, fit, manifest, batch, pending, folder is None, not known)
    if plan.pending_bytes > plan.free_bytes and not request.force:
        raise PlanError(
            f"this takes {plan.pending_bytes / 1e9:.1f} GB before compression, and {plan.free_bytes / 1e9:.1f} GB are "
            f"free on the disk of {request.store}: capture less, keep neurons as scores, make room, or add --force"
        )
    return plan


def _check(request: Request) -> None:
    check_batch_name(request.batch)
    for name, value in (("batch size", request.batch_size), ("shard size", request.shard_images)):
        if value is not None and value < 1:
            raise PlanError(f"a {name} of {value} images holds nothing: give at least 1")
    for place in (request.source, request.store):
        try:
            str(place.resolve()).encode()
            place.exists()
        except (OSError, RuntimeError, ValueError) as error:  # links in a circle, names too long or not text
            raise PlanError(f"{str(place)[:200]!r} cannot name a folder here: {str(error)[:100]}") from error
    source, store = request.source.resolve(), request.store.resolve()
    if store == source or source in store.parents:
        raise PlanError(f"the store {request.store} lies inside the source {request.source}: put it beside it")


def _resolved(recipe: Recipe, folder: StoreFolder) -> Recipe:
    """The recipe in the words of the store's model; of another family it is left as it is, and found to differ."""
    model = folder.manifest.model
    return recipe.resolved(model.neuron_layers) if model.family == "vit" else recipe


def _check_same(request: Request, differences: list[str]) -> None:
    if differences:
        raise StoreMismatchError(f"{request.store} was made otherwise: {'; '.join(differences)}; name another store")


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in _DEVICES:
        raise PlanError(f"the device {name!r} is not supported: choose auto, {', '.join(_DEVICES)} or one like cuda:1")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise PlanError(f"the device {name!r} cannot be used ({reason}): leave out --device to choose one") from error
    return name


def _open(store: Path) -> StoreFolder | None:
    """The store, if it exists; nothing, if it can be made there."""
    if not store.exists():
        return None
    if store.is_dir():
        names = {entry.name for entry in store.iterdir()}
        begun = STAGING in names and names <= {
            STAGING,
            BASIS,
            BATCHES,
            FITS,
        }  # as making a store leaves it, if interrupted
        if not names or (begun and not any((store / BATCHES).glob("*/zarr.json"))):
            return None
        if STAGING in names and "zarr.json" not in names:
            raise DamagedStoreError(f"{store} has lost its zarr.json: restore it, or name another store")
    return StoreFolder.open(store)


def _check_columns(folder: StoreFolder, listing: Listing) -> None:
    """One table shows all batches: a column cannot be a number in one and text in another."""
    for name in folder.batch_names():
        for shard in folder.shards(name)[:1]:
            try:
                pa.unify_schemas(
                    [folder.record(name, shard).schema, listing.extra.schema], promote_options="permissive"
                )
            except pa.ArrowException as error:
                raise SourceError(f"the metadata does not go with that of batch {name!r}: {error}") from error


def _check_batch(folder: StoreFolder, request: Request, digest: str, images: int) -> None:
    batch, source = folder.batch(request.batch), str(request.source.resolve())
    if batch.source != source:
        raise StoreMismatchError(
            f"batch {request.batch!r} was begun from {batch.source}, not {source}: "
            "ingest it under another name with --batch"
        )
    if batch.listing != digest:
        raise StoreMismatchError(
            f"batch {request.batch!r} was begun with {batch.images} images from {batch.source}, and {request.source} "
            f"now lists {images} with other names, sizes, labels or columns: ingest it under another name with --batch"
        )
    wanted = request.shard_images
    specs = dense_specs(folder.manifest.model, folder.manifest.recipe)
    if wanted is not None and shard_images(specs, wanted, images) != batch.shard_images:
        raise StoreMismatchError(
            f"batch {request.batch!r} was begun with {batch.shard_images} images per shard: "
            f"leave out --shard-images {wanted}"
        )


def _decomposition(
    request: Request, recipe: Recipe, loaded: LoadedModel, folder: StoreFolder | None, fit: Fit | None
) -> Decomposition:
    basis = folder.basis() if folder is not None else None
    try:
        decomposition = decompose(loaded.clip.visual, recipe, basis)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{request.model} cannot be decomposed exactly: {error}; supported are open_clip's ModifiedResNets, and "
            "VisionTransformers with standard attention that read the class token, average patch tokens, or pool with "
            "one learned query"
        ) from error
    if fit is not None and isinstance(decomposition, VitDecomposition):
        check_scoring(request, decomposition, fit)
        decomposition.score_by(fit)
    return decomposition


def _describe(loaded: LoadedModel, sizes: Sizes) -> Model:
    return Model(
        **asdict(sizes),
        name=loaded.name,
        pretrained=loaded.pretrained,
        fingerprint=loaded.fingerprint,
        config=loaded.config,
        preprocessing=loaded.preprocessing,
    )


def _manifest(model: Model, recipe: Recipe) -> Manifest:
    libraries = {name: version(name) for name in _LIBRARIES} | {"python": platform.python_version()}
    return Manifest(model, recipe, libraries, _now())


def _new_batch(request: Request, manifest: Manifest, digest: str, images: int) -> Batch:
    specs = dense_specs(manifest.model, manifest.recipe)
    return Batch(
        source=str(request.source.resolve()),
        images=images,
        shard_images=shard_images(specs, request.shard_images, images),
        listing=digest,
        created=_now(),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
