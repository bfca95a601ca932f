"""Making stores and batches, and writing shards: whole, once, recorded last."""

import hashlib
import io
import json
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray
from zarr.buffer import cpu
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.errors import ZarrUserWarning
from zarr.storage import LocalStore, MemoryStore

from schemas.errors import BusyStoreError, DamagedStoreError, PrecisionError, SelectionError
from schemas.fits import Fit
from schemas.layout import (
    BASIS,
    BATCHES,
    FITS,
    SIGNIFICANT,
    StaticSpec,
    array_specs,
    basis_specs,
    create_array,
    record_path,
    shard_key,
    significant_path,
)
from schemas.manifest import Batch, Manifest
from schemas.store import RECORD_KEY, Digest, StoreFolder
from workers.staging import Staging, refusals, staging

_STORE_ITSELF: Final = ".store"  # no batch can be called so
_GROUP_ROWS: Final = 64 * 1024  # of a Parquet file: one neuron's significant scores lie in few groups

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class ShardContent:
    """What one shard is to hold."""

    arrays: Mapping[str, Floats]  # (images of the shard, ...) for each array of the store
    significant: pa.Table | None  # scores, where the store keeps the significant ones
    images: pa.Table  # the image table, in the same order


def create_store(path: Path, manifest: Manifest, basis: Mapping[str, Floats], fit: Fit | None = None) -> None:
    """Makes an empty store.

    The root's description is written last: before that there is no store, and a later call starts afresh.

    Args:
        path: where.
        manifest: what it will hold.
        basis: the arrays of `schemas.layout.basis_specs`.
        fit: what its scores are made by, if it holds scores.

    Raises:
        BusyStoreError: another process is making it, or just did.
        StoreWriteError: the disk refused.
    """
    with staging(path, _STORE_ITSELF) as area, refusals(path):
        if (path / "zarr.json").is_file():
            raise BusyStoreError(f"another process made {path} meanwhile: run the command again")
        draft = area.folder / "store"
        group = zarr.open_group(LocalStore(draft), mode="w", zarr_format=3, attributes=manifest.to_json())
        group.create_group(BATCHES)
        _write_static(draft / BASIS, {}, basis_specs(manifest.model, manifest.recipe), basis)
        parts = [BATCHES, BASIS]
        if fit is not None:
            _write_static(draft / FITS / fit.name, fit.to_json(), fit.specs(), fit.arrays)
            parts.append(FITS)
        for part in parts:
            area.publish_folder(draft / part, path / part)
        area.publish_file((draft / "zarr.json").read_bytes(), path / "zarr.json")
        shutil.rmtree(draft)


def add_fit(folder: StoreFolder, fit: Fit) -> None:
    """Keeps a fit in a store; one of the same name is the same.

    Raises:
        PrecisionError: it holds something that is no number.
        BusyStoreError: another process is adding one.
        StoreWriteError: the disk refused.
    """
    if not all(np.isfinite(array).all() for array in fit.arrays.values()):
        raise PrecisionError(f"the fit {fit.name} holds numbers past float32: its images' contributions are too large")
    with staging(folder.path, _STORE_ITSELF) as area, refusals(folder.path):
        draft, place = area.folder / "fit", folder.path / FITS / fit.name
        _write_static(draft, fit.to_json(), fit.specs(), fit.arrays)
        if _is_whole(folder, fit.name):  # the same sample was fitted before: only the time is new
            area.publish_file((draft / "zarr.json").read_bytes(), place / "zarr.json")
        else:
            area.publish_folder(draft, place)


def _is_whole(folder: StoreFolder, fit: str) -> bool:
    try:
        folder.fit(fit)
    except (DamagedStoreError, SelectionError):
        return False
    return True


def create_batch(folder: StoreFolder, area: Staging, name: str, batch: Batch) -> None:
    """Makes a batch without shards.

    Raises:
        BusyStoreError: another process just made it.
        StoreWriteError: the disk refused.
    """
    if name in folder.batch_names():
        raise BusyStoreError(f"another process began batch {name!r} of {folder.path} meanwhile: run the command again")
    with refusals(folder.path):
        # Records without a batch are left of one that was removed by hand: they must not speak for this one.
        for place in (record_path(name, 0), significant_path(name, 0)):
            shutil.rmtree(folder.path / place.parent, ignore_errors=True)
    draft = area.folder / "batch"
    with refusals(draft):
        store = LocalStore(draft)
        zarr.open_group(store, mode="w", zarr_format=3, attributes=batch.to_json())
        for spec in array_specs(folder.manifest.model, folder.manifest.recipe):
            create_array(store, spec.name, spec, batch)
        _consolidate(store)
    area.publish_folder(draft, folder.path / BATCHES / name)


def drop_batch(folder: StoreFolder, name: str) -> None:
    """Removes a batch: its records first, so that what is left of a removal that was stopped is a batch without shards.

    Raises:
        SelectionError: there is no such batch.
        BusyStoreError: another process is writing to it.
        StoreWriteError: the disk refused; the same call completes the removal.
    """
    folder.batch(name)
    with staging(folder.path, name) as area, refusals(folder.path):
        for place in (record_path(name, 0).parent, significant_path(name, 0).parent, Path(BATCHES) / name):
            if (folder.path / place).exists():
                away = area.folder / place.parent.name
                (folder.path / place).replace(away)
                shutil.rmtree(away)


def write_shard(folder: StoreFolder, area: Staging, name: str, shard: int, content: ShardContent) -> int:
    """Writes one shard of a batch and, when all of it is on disk, its record.

    Args:
        folder: the store.
        area: the batch's staging area, held by the caller.
        name: the batch.
        shard: which of its shards.
        content: what it is to hold.

    Returns:
        The bytes written.

    Raises:
        StoreWriteError: the disk refused; the shard does not exist.
    """
    digests: dict[str, Digest] = {}
    first = int(content.images["row"][0].as_py())
    for part, place in folder.shard_paths(name, shard).items():
        if part == SIGNIFICANT:
            assert content.significant is not None, "the store keeps significant scores"
            data = _encode_table(content.significant)
        else:
            metadata = folder.array_metadata(name, part)
            data = encode_shard(metadata, shard_key(folder.specs[part], shard), first, content.arrays[part])
        area.publish_file(data, place)
        digests[part] = Digest(len(data), hashlib.sha256(data).hexdigest())
    told = json.dumps({"arrays": {part: asdict(digest) for part, digest in digests.items()}})
    record = _encode_table(content.images.replace_schema_metadata({RECORD_KEY: told.encode()}))
    area.publish_file(record, folder.path / record_path(name, shard))
    return sum(digest.bytes for digest in digests.values()) + len(record)


def encode_shard(metadata: bytes, key: str, first: int, values: Floats) -> bytes:
    """The bytes of one shard of the array that ``metadata`` describes, made in memory.

    Args:
        metadata: the array's ``zarr.json``.
        key: the shard's object, below the array.
        first: the shard's first row.
        values: its rows.
    """
    objects: dict[str, Any] = {"zarr.json": cpu.Buffer.from_bytes(metadata)}
    # A shard of failed images alone is written too: what is recorded is there, and what is not there is missing.
    array = zarr.open_array(MemoryStore(objects), mode="r+", zarr_format=3).with_config({"write_empty_chunks": True})
    array[first : first + len(values)] = values
    data: bytes = objects[key].to_bytes()
    return data


def _encode_table(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    # Rounded numbers end in zeros, which compress once the bytes of one rank lie together.
    numbers = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    encodings = dict.fromkeys(numbers, "BYTE_STREAM_SPLIT")
    pq.write_table(
        table,
        sink,
        compression="zstd",
        write_page_checksum=True,
        row_group_size=_GROUP_ROWS,
        use_dictionary=[name for name in table.column_names if name not in numbers],
        column_encoding=encodings or None,
    )
    return sink.getvalue()


def _write_static(
    place: Path, attributes: dict[str, Any], specs: Iterable[StaticSpec], arrays: Mapping[str, Floats]
) -> None:
    """Writes a group of arrays that depend on no image."""
    group = zarr.open_group(LocalStore(place), mode="w", zarr_format=3, attributes=attributes)
    for spec in specs:
        group.create_array(
            spec.name,
            data=arrays[spec.name],
            dimension_names=spec.dims,
            fill_value=float("nan"),
            compressors=[BloscCodec(cname="zstd"), Crc32cCodec()],
        )
    _consolidate(LocalStore(place))


def _consolidate(group: LocalStore) -> None:
    """Repeats the metadata of a group's arrays, which never change, in the group's own: it opens in one read."""
    with warnings.catch_warnings():
        # It is not in Zarr's specification yet: readers that know it gain by it, and others ignore it.
        warnings.simplefilter("ignore", ZarrUserWarning)
        zarr.consolidate_metadata(group)
