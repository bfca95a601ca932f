"""Opening a store's folder: what it says of itself, which shards exist, and its arrays."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore

from schemas.errors import DamagedStoreError, NotAStoreError, SelectionError
from schemas.layout import BASIS, BATCHES, ArraySpec, array_specs, record_path, shard_key
from schemas.manifest import FORMAT, KEY, Batch, Manifest
from schemas.tables import IMAGE_COLUMNS

RECORD_KEY: Final = b"spectrograph"


@dataclass(frozen=True)
class Digest:
    """What a shard's record says of one of its objects."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoreFolder:
    """A store on disk, read and not interpreted. It only ever sees shards that were recorded."""

    path: Path
    manifest: Manifest
    specs: Mapping[str, ArraySpec]

    @classmethod
    def open(cls, path: Path) -> Self:
        """The store at ``path``.

        Raises:
            NotAStoreError: there is none, or one of a format that this version does not read.
            DamagedStoreError: its description cannot be read.
        """
        attributes = _attributes(path)
        described = attributes.get(KEY)
        if described is None:
            raise NotAStoreError(f"{path} is no Spectrograph store: make one with 'spectrograph ingest SOURCE {path}'")
        found = described.get("format") if isinstance(described, dict) else None
        if isinstance(found, int) and found != FORMAT:
            raise NotAStoreError(f"{path} is a store of format {found}, and this version reads format {FORMAT}")
        try:
            manifest = Manifest.from_json(attributes)
        except ValueError as error:
            raise DamagedStoreError(f"{path / 'zarr.json'} does not describe the store: {error}") from error
        return cls(path, manifest, {spec.name: spec for spec in array_specs(manifest.model, manifest.recipe)})

    def batch_names(self) -> list[str]:
        """The batches, by name."""
        folder = self.path / BATCHES
        return (
            sorted(entry.name for entry in folder.iterdir() if (entry / "zarr.json").is_file())
            if folder.is_dir()
            else []
        )

    def batch(self, name: str) -> Batch:
        """One batch's description.

        Raises:
            SelectionError: there is no such batch.
        """
        if name not in self.batch_names():
            raise SelectionError(f"{self.path} has no batch {name!r}; it has {', '.join(self.batch_names()) or 'none'}")
        try:
            return Batch.from_json(_attributes(self.path / BATCHES / name))
        except ValueError as error:
            raise DamagedStoreError(f"batch {name!r} of {self.path} does not describe itself: {error}") from error

    def shards(self, batch: str) -> list[int]:
        """The shards of a batch that exist, in order."""
        folder = (self.path / record_path(batch, 0)).parent
        files = folder.glob("*.parquet") if folder.is_dir() else ()
        return sorted(int(file.stem) for file in files if file.stem.isdecimal())

    def record(self, batch: str, shard: int) -> pa.Table:
        """The image table of one shard.

        Raises:
            DamagedStoreError: the record cannot be read.
        """
        file = self.path / record_path(batch, shard)
        try:
            table = pq.read_table(file, partitioning=None, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise DamagedStoreError(f"{file} cannot be read: {error}") from error
        if table.column_names[: len(IMAGE_COLUMNS)] != IMAGE_COLUMNS.names or any(
            table.schema.field(field.name).type != field.type for field in IMAGE_COLUMNS
        ):
            raise DamagedStoreError(f"{file} has other columns than an image table")
        return table

    def digests(self, batch: str, shard: int) -> dict[str, Digest]:
        """What the record of one shard says of its objects, by array.

        Raises:
            DamagedStoreError: the record cannot be read.
        """
        file = self.path / record_path(batch, shard)
        try:
            values = json.loads(pq.read_schema(file).metadata[RECORD_KEY])
            return {name: Digest(**digest) for name, digest in values["arrays"].items()}
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise DamagedStoreError(f"{file} does not say what its shard holds: {error}") from error

    def shard_path(self, batch: str, spec: ArraySpec, shard: int) -> Path:
        """The object that holds one shard of an array."""
        return self.path / BATCHES / batch / spec.name / shard_key(spec, shard)

    def array(self, batch: str, name: str) -> zarr.Array[Any]:
        """One array of a batch, to read."""
        return self._array(f"{BATCHES}/{batch}/{name}")

    def basis(self) -> dict[str, NDArray[np.float32]]:
        """The basis, by array.

        Raises:
            DamagedStoreError: some of it is missing or changed.
        """
        model = self.manifest.model
        shapes = {
            "heads": (model.layers, model.heads, model.coefficients, model.dim),
            "norm_terms": (model.terms, model.dim),
            "bias_terms": (model.layers, model.terms, model.dim),
        }
        found = {}
        for name, shape in shapes.items():
            place = self.path / BASIS / name
            try:
                values = np.asarray(self._array(f"{BASIS}/{name}")[:], np.float32)
            except (OSError, ValueError, RuntimeError) as error:
                raise DamagedStoreError(f"{place} is damaged: {error}") from error
            if values.shape != shape or not np.isfinite(values).all():
                raise DamagedStoreError(f"{place} is damaged: parts of it were never written, or are gone")
            found[name] = values
        return found

    def array_metadata(self, batch: str, name: str) -> bytes:
        """The ``zarr.json`` of one array of a batch.

        Raises:
            DamagedStoreError: it is missing.
        """
        file = self.path / BATCHES / batch / name / "zarr.json"
        try:
            return file.read_bytes()
        except OSError as error:
            raise DamagedStoreError(f"{file} cannot be read: {error.strerror}") from error

    def _array(self, path: str) -> zarr.Array[Any]:
        try:
            found = zarr.open_array(LocalStore(self.path, read_only=True), path=path, mode="r", zarr_format=3)
        except (FileNotFoundError, KeyError, ValueError) as error:
            raise DamagedStoreError(f"{self.path / path} is not the array that it should be: {error}") from error
        return found


def _attributes(path: Path) -> Mapping[str, Any]:
    """The attributes of the Zarr group at ``path``; none where there is no group."""
    file = path / "zarr.json"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        missing = (
            "is empty"
            if path.is_dir() and not any(path.iterdir())
            else "holds no zarr.json"
            if path.is_dir()
            else "does not exist"
        )
        raise NotAStoreError(
            f"{path} {missing}, so it is no store: make one with 'spectrograph ingest SOURCE {path}'"
        ) from None
    except NotADirectoryError:
        raise NotAStoreError(f"{path} is a file, and a store is a folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedStoreError(f"{file} cannot be read: {error}") from error
    try:
        attributes = json.loads(text).get("attributes", {})
    except (ValueError, AttributeError) as error:
        raise DamagedStoreError(f"{file} is not JSON: {error}") from error
    return attributes if isinstance(attributes, dict) else {}
