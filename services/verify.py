"""Does a store still say what it said? Checksums of all that is recorded, and a sample of images encoded anew."""

import hashlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.errors import DamagedStoreError, SourceError, StoreMismatchError
from schemas.store import StoreFolder
from services.store import Store
from workers.decoding import Decoded, FileFacts, decode_image
from workers.models import LoadedModel, load_model
from workers.precision import autocast
from workers.sources.opening import place_of
from workers.towers import decompose
from workers.vit import VitDecomposition

# How far a sum over the stored parts may be from the representation, relative to it: the precision of the model's
# arithmetic, plus half a unit in the last place of each stored part.
_ARITHMETIC: Final = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}
_AT_ONCE: Final = 32
_ROUNDING: Final = {"float32": 2.0**-23, "float16": 2.0**-11}


@dataclass(frozen=True)
class Checksums:
    """What was recomputed from the disk."""

    shards: int
    objects: int
    bytes: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """What a sample of images came to when it was encoded anew; differences are relative to the representation."""

    images: int
    unavailable: int  # their files are gone or changed
    representation: float  # the largest difference between stored and anew
    total: float | None  # between the sum of contributions and anew; None where not all parts are captured
    neurons: float | None  # between what is stored of neurons and anew, relative to itself; None where nothing is
    problems: tuple[str, ...]


def verify_checksums(folder: StoreFolder) -> Checksums:
    """Reads every recorded object and compares it with its record."""
    shards = objects = size = 0
    problems: list[str] = []
    for batch in folder.batch_names():
        for shard in folder.shards(batch):
            shards += 1
            try:
                problems += _shard_problems(folder, batch, shard)
                objects += len(folder.shard_paths(batch, shard))
                size += sum(digest.bytes for digest in folder.digests(batch, shard).values())
            except DamagedStoreError as error:
                problems.append(str(error))
    problems += _static_problems(folder)
    return Checksums(shards, objects, size, tuple(problems))


def verify_sample(store: Store, count: int, device: str) -> Sample:
    """Encodes up to ``count`` stored images anew, with the stock model, and compares.

    Raises:
        ModelError: the store's model cannot be loaded here.
        StoreMismatchError: a model of that name loads, with other weights.
    """
    known = store.manifest.model
    loaded = load_model(known.name, known.pretrained, device=device)
    if loaded.fingerprint != known.fingerprint:
        raise StoreMismatchError(f"{known.name} has other weights now than those that made {store.folder.path}")
    stored = store.images().num_rows
    chosen = np.unique(np.linspace(0, stored - 1, min(count, stored)).astype(np.intp))
    scoring = _neurons_anew(store, loaded)
    parts = [_sample_some(store, loaded, scoring, chosen[at : at + _AT_ONCE]) for at in range(0, len(chosen), _AT_ONCE)]
    totals = [part.total for part in parts if part.total is not None]
    neurons = [part.neurons for part in parts if part.neurons is not None]
    return Sample(
        images=sum(part.images for part in parts),
        unavailable=sum(part.unavailable for part in parts),
        representation=max((part.representation for part in parts), default=0.0),
        total=max(totals, default=None),
        neurons=max(neurons, default=None),
        problems=tuple(problem for part in parts for problem in part.problems),
    )


def _neurons_anew(store: Store, loaded: LoadedModel) -> VitDecomposition | None:
    """What computes a transformer's neurons again, beside the stock model, from the store's own basis and fit."""
    recipe = store.manifest.recipe
    if not recipe.output_layers:
        return None
    decomposition = decompose(deepcopy(loaded.clip.visual), recipe, store.folder.basis())
    assert isinstance(decomposition, VitDecomposition), "only transformers have such layers"
    if recipe.fit is not None:
        decomposition.score_by(store.fit(recipe.fit))
    return decomposition


def _sample_some(
    store: Store, loaded: LoadedModel, scoring: VitDecomposition | None, chosen: NDArray[np.intp]
) -> Sample:
    pixels, names = [], []
    for row in store.images().take(chosen).to_pylist():
        decoded = _decoded(row["source"], loaded)
        if decoded.pixels is not None and decoded.facts.sha256 == row["sha256"]:
            pixels.append(decoded.pixels)
            names.append(row["image_id"])
    if not names:
        return Sample(0, len(chosen), 0.0, None, None, ())
    batch = torch.stack(pixels)
    anew = _encode(loaded, batch, store.manifest.recipe.precision)  # (N, D)
    sample = _compare(store, names, anew, len(chosen) - len(names))
    if scoring is None:
        return sample
    largest, problems = _compare_neurons(store, names, scoring.encode(batch.to(loaded.device)))
    return replace(sample, neurons=largest, problems=(*sample.problems, *problems))


def _compare_neurons(store: Store, names: list[str], anew: dict[str, torch.Tensor]) -> tuple[float, list[str]]:
    """The largest difference of what is stored of neurons, and where it is too large."""
    recipe, largest, problems = store.manifest.recipe, 0.0, []
    allowed = 10 * _ARITHMETIC[recipe.precision] + _ROUNDING[recipe.dtype]
    for name in (name for name in store.folder.specs if name.startswith(("neuron", "direct"))):
        truth = anew[name].float().cpu().flatten(1).numpy()  # (N, ...)
        found = store.coefficients(name, images=names).astype(np.float32).reshape(truth.shape)
        lengths = np.maximum(np.linalg.norm(truth, axis=1), np.finfo(np.float32).tiny)
        away = np.linalg.norm(found - truth, axis=1) / lengths  # (N,)
        problems += [
            f"{image}: {name} is {distance:.1e} of its norm away from what the model gives"
            for image, distance in zip(names, away, strict=True)
            if not distance <= allowed
        ]
        largest = max(largest, float(away.max()))
    return largest, problems


def _decoded(source: str, loaded: LoadedModel) -> Decoded:
    try:
        return decode_image(place_of(source), loaded.preprocess)
    except (OSError, SourceError) as error:  # its container is gone, or was cut short
        return Decoded(FileFacts(error=str(error)), None)


def _compare(store: Store, names: list[str], anew: NDArray[np.float32], unavailable: int) -> Sample:
    recipe = store.manifest.recipe
    norms = np.linalg.norm(anew, axis=1)  # (N,)
    arithmetic = _ARITHMETIC[recipe.precision]
    away = np.linalg.norm(store.representation(images=names) - anew, axis=1) / norms  # (N,)
    problems = [
        f"{name}: the model's output is {distance:.1e} of its norm away from the stored one"
        for name, distance in zip(names, away, strict=True)
        if not distance <= arithmetic
    ]
    total = None
    summed = _summed(store, names)
    if summed is not None:
        parts, lengths = summed
        missing = np.linalg.norm(parts + store.constant(images=names) - anew, axis=1) / norms  # (N,)
        rounding = _ROUNDING[recipe.dtype] * lengths / norms  # (N,)
        problems += [
            f"{name}: its contributions sum to {distance:.1e} of its norm away from the model's output"
            for name, distance, allowed in zip(names, missing, arithmetic + rounding, strict=True)
            if not distance <= allowed
        ]
        total = float(missing.max())
    return Sample(len(names), unavailable, float(away.max()), total, None, tuple(problems))


def _summed(store: Store, names: list[str]) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """The sum of all contributions but the constant, (N, D), and that of their norms, (N,), where they are captured."""
    capture, model = set(store.manifest.recipe.capture), store.manifest.model
    if "pairs" in capture:
        total = np.zeros((len(names), model.dim), np.float32)
        lengths = np.zeros(len(names), np.float32)
        for first in range(0, model.neurons, _AT_ONCE):  # all pairs of a large ResNet are gigabytes
            some = store.pairs(neuron=slice(first, first + _AT_ONCE), images=names)  # (N, n, H, D)
            total += some.sum(axis=(1, 2))
            lengths += np.linalg.norm(some, axis=3).sum(axis=(1, 2))
        return total, lengths
    if not {"heads", "mlps"} <= capture:
        return None
    heads, mlps = store.heads(images=names), store.mlps(images=names)  # (N, L, H, D), (N, L, D)
    embedding = store.embedding(images=names)  # (N, D)
    parts = np.concatenate([heads.reshape(len(names), -1, heads.shape[-1]), mlps, embedding[:, None]], axis=1)
    return parts.sum(axis=1), np.linalg.norm(parts, axis=2).sum(axis=1)


def _encode(loaded: LoadedModel, pixels: torch.Tensor, precision: str) -> NDArray[np.float32]:
    with torch.no_grad(), autocast(loaded.device, precision):
        output = loaded.clip.visual(pixels.to(loaded.device))
    representation = output[0] if isinstance(output, tuple) else output
    anew: NDArray[np.float32] = representation.float().cpu().numpy()
    return anew


def _static_problems(folder: StoreFolder) -> Iterator[str]:
    made_by = folder.manifest.recipe.fit
    reads: list[Callable[[], object]] = [folder.basis]
    try:
        names = {*folder.fit_names(), *([made_by] if made_by else [])}
        reads += [partial(folder.fit, name) for name in sorted(names)]
    except DamagedStoreError as error:
        yield str(error)
    for read in reads:
        try:
            read()
        except DamagedStoreError as error:
            yield str(error)


def _shard_problems(folder: StoreFolder, batch: str, shard: int) -> Iterator[str]:
    rows = folder.record(batch, shard)["row"].to_pylist()
    if rows != list(folder.batch(batch).rows(shard)):
        yield f"the record of shard {shard} of batch {batch!r} lists other rows than its own"
    digests = folder.digests(batch, shard)
    for name, file in folder.shard_paths(batch, shard).items():
        if name not in digests:
            yield f"{file} is not recorded"
        elif not file.is_file():
            yield f"{file} is missing"
        elif _sha256(file) != digests[name].sha256:
            yield f"{file} is not what was written: its checksum differs"


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
