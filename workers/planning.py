"""What an ingest would do, worked out before anything is written: the source listed, the model loaded, all compared."""

import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final

import pyarrow as pa
import torch

from schemas.errors import DamagedStoreError, PlanError, SourceError, StoreMismatchError, UnsupportedModelError
from schemas.layout import BASIS, BATCHES, STAGING, array_specs, check_batch_name, image_bytes, shard_images
from schemas.manifest import Batch, Manifest, Model
from schemas.recipe import Recipe
from schemas.store import StoreFolder
from workers.models import LoadedModel, load_model
from workers.sources import Listing, list_folder
from workers.vit import Basis, VitDecomposition

_DEVICES: Final = ("cpu", "cuda", "mps")
_LIBRARIES: Final = ("spectrograph", "torch", "open_clip_torch", "zarr", "numcodecs", "pyarrow", "pillow")


@dataclass(frozen=True)
class Request:
    """What a user asks an ingest to do."""

    source: Path
    store: Path
    model: str
    pretrained: str | None
    batch: str
    recipe: Recipe
    device: str  # "auto", or as torch calls it
    batch_size: int
    shard_images: int | None  # None: as many as suit the recipe


@dataclass(frozen=True)
class Plan:
    """What an ingest would do; nothing is written yet."""

    request: Request
    listing: Listing
    loaded: LoadedModel
    decomposition: VitDecomposition
    manifest: Manifest
    batch: Batch
    pending: tuple[int, ...]  # shards that are not recorded yet
    is_new_store: bool
    is_new_batch: bool

    @property
    def image_bytes(self) -> int:
        """Bytes of one image in all arrays, uncompressed."""
        return image_bytes(array_specs(self.manifest.model, self.manifest.recipe))

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
    listing = list_folder(request.source)
    digest = listing.digest()
    known = folder is not None and request.batch in folder.batch_names()
    if folder is not None:
        _check_columns(folder, listing)
    if folder is not None and known:
        _check_batch(folder, request, digest, len(listing))
    loaded = load_model(request.model, request.pretrained, device=device)
    decomposition = _decomposition(request, loaded, folder)
    model = _describe(loaded, decomposition)
    if folder is not None:
        differences = folder.manifest.differences(model, request.recipe)
        if differences:
            raise StoreMismatchError(
                f"{request.store} was made otherwise: {'; '.join(differences)}; name another store"
            )
    manifest = folder.manifest if folder else _manifest(model, request.recipe)
    batch = folder.batch(request.batch) if folder and known else _new_batch(request, manifest, digest, len(listing))
    done = set(folder.shards(request.batch)) if folder and known else set()
    pending = tuple(shard for shard in range(batch.shards) if shard not in done)
    return Plan(request, listing, loaded, decomposition, manifest, batch, pending, folder is None, not known)


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
        begun = STAGING in names and names <= {STAGING, BASIS, BATCHES}  # as making a store leaves it, if interrupted
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
    if wanted is not None and shard_images(tuple(folder.specs.values()), wanted, images) != batch.shard_images:
        raise StoreMismatchError(
            f"batch {request.batch!r} was begun with {batch.shard_images} images per shard: "
            f"leave out --shard-images {wanted}"
        )


def _decomposition(request: Request, loaded: LoadedModel, folder: StoreFolder | None) -> VitDecomposition:
    basis = None
    if folder is not None and folder.manifest.model.fingerprint == loaded.fingerprint:
        basis = Basis(**folder.basis())
    try:
        return VitDecomposition(
            loaded.clip.visual, request.recipe.capture, precision=request.recipe.precision, basis=basis
        )
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{request.model} cannot be decomposed exactly: {error}; supported are open_clip's VisionTransformers with "
            "standard attention that read the class token, average patch tokens, or pool with one learned query"
        ) from error


def _describe(loaded: LoadedModel, decomposition: VitDecomposition) -> Model:
    layers, heads, coefficients, dim = decomposition.basis.heads.shape
    return Model(
        name=loaded.name,
        pretrained=loaded.pretrained,
        fingerprint=loaded.fingerprint,
        family="vit",
        layers=layers,
        heads=heads,
        coefficients=coefficients,
        tokens=decomposition.tokens,
        dim=dim,
        terms=len(decomposition.basis.norm_terms),
        config=loaded.config,
        preprocessing=loaded.preprocessing,
    )


def _manifest(model: Model, recipe: Recipe) -> Manifest:
    libraries = {name: version(name) for name in _LIBRARIES} | {"python": platform.python_version()}
    return Manifest(model, recipe, libraries, _now())


def _new_batch(request: Request, manifest: Manifest, digest: str, images: int) -> Batch:
    specs = array_specs(manifest.model, manifest.recipe)
    return Batch(
        source=str(request.source.resolve()),
        images=images,
        shard_images=shard_images(specs, request.shard_images, images),
        listing=digest,
        created=_now(),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
