"""Making stores and batches, and writing shards: whole, once, recorded last."""

import hashlib
import io
import json
import shutil
import warnings
from collections.abc import Mapping
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

from schemas.errors import BusyStoreError
from schemas.layout import BASIS, BATCHES, array_specs, create_array, record_path, shard_key
from schemas.manifest import Batch, Manifest
from schemas.store import RECORD_KEY, Digest, StoreFolder
from workers.staging import Staging, refusals, staging

_STORE_ITSELF: Final = ".store"  # no batch can be called so

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class BasisArray:
    """One static array with the names of its dimensions."""

    values: Floats
    dims: tuple[str, ...]


def create_store(path: Path, manifest: Manifest, basis: Mapping[str, BasisArray]) -> None:
    """Makes an empty store.

    The root's description is written last: before that there is no store, and a later call starts afresh.

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
        static = group.create_group(BASIS)
        for name, array in basis.items():
            static.create_array(
                name,
                data=array.values,
                dimension_names=array.dims,
                fill_value=float("nan"),
                compressors=[BloscCodec(cname="zstd"), Crc32cCodec()],
            )
        _consolidate(LocalStore(draft / BASIS))
        for part in (BATCHES, BASIS):
            area.publish_folder(draft / part, path / part)
        area.publish_file((draft / "zarr.json").read_bytes(), path / "zarr.json")
        shutil.rmtree(draft)


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
        shutil.rmtree(folder.path / record_path(name, 0).parent, ignore_errors=True)
    draft = area.folder / "batch"
    with refusals(draft):
        store = LocalStore(draft)
        zarr.open_group(store, mode="w", zarr_format=3, attributes=batch.to_json())
        for spec in array_specs(folder.manifest.model, folder.manifest.recipe):
            create_array(store, spec.name, spec, batch)
        _consolidate(store)
    area.publish_folder(draft, folder.path / BATCHES / name)


def write_shard(
    folder: StoreFolder, area: Staging, name: str, shard: int, *, arrays: Mapping[str, Floats], images: pa.Table
) -> int:
    """Writes one shard of a batch and, when all of it is on disk, its record.

    Args:
        folder: the store.
        area: the batch's staging area, held by the caller.
        name: the batch.
        shard: which of its shards.
        arrays: (images of the shard, ...) for each array of the store.
        images: the shard's image table, in the same order.

    Returns:
        The bytes written.

    Raises:
        StoreWriteError: the disk refused; the shard does not exist.
    """
    digests: dict[str, Digest] = {}
    for spec in folder.specs.values():
        metadata = folder.array_metadata(name, spec.name)
        data = encode_shard(metadata, shard_key(spec, shard), int(images["row"][0].as_py()), arrays[spec.name])
        area.publish_file(data, folder.shard_path(name, spec, shard))
        digests[spec.name] = Digest(len(data), hashlib.sha256(data).hexdigest())
    record = json.dumps({"arrays": {array: asdict(digest) for array, digest in digests.items()}})
    sink = io.BytesIO()
    described = images.replace_schema_metadata({RECORD_KEY: record.encode()})
    pq.write_table(described, sink, compression="zstd", write_page_checksum=True)
    area.publish_file(sink.getvalue(), folder.path / record_path(name, shard))
    return sum(digest.bytes for digest in digests.values()) + sink.tell()


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


def _consolidate(group: LocalStore) -> None:
    """Repeats the metadata of a group's arrays, which never change, in the group's own: it opens in one read."""
    with warnings.catch_warnings():
        # It is not in Zarr's specification yet: readers that know it gain by it, and others ignore it.
        warnings.simplefilter("ignore", ZarrUserWarning)
        zarr.consolidate_metadata(group)
