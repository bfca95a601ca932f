"""Opening a store's folder: what it says of itself, which shards exist, and its arrays."""

import json
from collections.abc import Mapping, Sequence
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
from schemas.fits import Fit
from schemas.layout import (
    BASIS,
    BATCHES,
    FITS,
    SIGNIFICANT,
    ArraySpec,
    StaticSpec,
    array_specs,
    basis_specs,
    record_path,
    shard_key,
    significant_path,
)
from schemas.manifest import FORMAT, KEY, Batch, Manifest
from schemas.tables import IMAGE_COLUMNS, SIGNIFICANT_COLUMNS

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
        found = described.get("format") if isinstance(described, dict) else FORMAT
        if found != FORMAT:
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
        table = _parquet(file)
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

    def shard_paths(self, batch: str, shard: int) -> dict[str, Path]:
        """Every object of one shard but its record, by array or table."""
        paths = {name: self.shard_path(batch, spec, shard) for name, spec in self.specs.items()}
        if self.manifest.recipe.level == "significant":
            paths[SIGNIFICANT] = self.path / significant_path(batch, shard)
        return paths

    def significant(self, batch: str, shard: int, layer: int, neurons: Sequence[int]) -> pa.Table:
        """The significant scores of some neurons in one shard.

        Raises:
            DamagedStoreError: they cannot be read, or their file has another size than was recorded.
        """
        file = self.path / significant_path(batch, shard)
        known = self.digests(batch, shard).get(SIGNIFICANT)
        if known is None or not file.is_file() or file.stat().st_size != known.bytes:
            raise DamagedStoreError(f"{file} is not what was recorded: run 'spectrograph verify'")
        table = _parquet(file, [("layer", "==", layer), ("neuron", "in", list(neurons))])
        if table.schema.names != SIGNIFICANT_COLUMNS.names:
            raise DamagedStoreError(f"{file} has other columns than a table of scores")
        return table

    def array(self, batch: str, name: str) -> zarr.Array[Any]:
        """One array of a batch, to read."""
        return self._array(f"{BATCHES}/{batch}/{name}")

    def basis(self) -> dict[str, NDArray[np.float32]]:
        """The basis, by array.

        Raises:
            DamagedStoreError: some of it is missing or changed.
        """
        return {spec.name: self._static(BASIS, spec) for spec in basis_specs(self.manifest.model, self.manifest.recipe)}

    def fit_names(self) -> list[str]:
        """The fits, the latest last."""
        folder = self.path / FITS
        names = [entry.name for entry in folder.iterdir() if (entry / "zarr.json").is_file()] if folder.is_dir() else []
        return sorted(names, key=lambda name: (self._fit(name).created, name))

    def fit(self, name: str | None = None) -> Fit:
        """A fit with its arrays: the one called ``name``, or the latest.

        Raises:
            SelectionError: there is no such fit.
            DamagedStoreError: some of it is missing or changed.
        """
        fit = self.fit_description(name)
        try:
            return fit.with_arrays({spec.name: self._static(f"{FITS}/{fit.name}", spec) for spec in fit.specs()})
        except DamagedStoreError as error:
            raise DamagedStoreError(f"{error}; remove {self.path / FITS / fit.name} and fit again") from error

    def fit_description(self, name: str | None = None) -> Fit:
        """The same without its arrays."""
        names, made_by = self.fit_names(), self.manifest.recipe.fit
        if made_by is not None and made_by not in names:
            raise DamagedStoreError(f"{self.path} has lost the fit {made_by} that made its scores: restore its {FITS}")
        if not names or (name is not None and name not in names):
            known = f"; it has {', '.join(names)}" if names else ": make one with 'spectrograph fit'"
            raise SelectionError(f"{self.path} has no fit{'' if name is None else f' {name!r}'}{known}")
        fit = self._fit(names[-1] if name is None else name)
        if lacking := fit.lacks(self.manifest.recipe, self.manifest.model):
            raise DamagedStoreError(f"{self.path / FITS / fit.name} is not of this store: it has {lacking}")
        return fit

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

    def _fit(self, name: str) -> Fit:
        place = self.path / FITS / name
        try:
            fit = Fit.from_json(_attributes(place))
        except ValueError as error:
            raise DamagedStoreError(f"{place} does not describe a fit: {error}") from error
        if fit.name != name:
            raise DamagedStoreError(f"{place} describes another fit, {fit.name}")
        return fit

    def _static(self, folder: str, spec: StaticSpec) -> NDArray[np.float32]:
        place = self.path / folder / spec.name
        array = self._array(f"{folder}/{spec.name}")
        if (array.shape, str(array.dtype)) != (spec.shape, "float32"):
            raise DamagedStoreError(
                f"{place} is damaged: it holds {array.dtype} {array.shape}, not float32 {spec.shape}"
            )
        try:
            values = np.asarray(array[...], np.float32)
        except (OSError, ValueError, RuntimeError, TypeError, ArithmeticError) as error:
            reason = str(error).partition(". Stored")[0]  # zarr goes on with the raw bytes of both checksums
            raise DamagedStoreError(f"{place} is damaged: {reason}") from error
        if not np.isfinite(values).all():
            raise DamagedStoreError(f"{place} is damaged: parts of it were never written, or are gone")
        return values

    def _array(self, path: str) -> zarr.Array[Any]:
        try:
            found = zarr.open_array(LocalStore(self.path, read_only=True), path=path, mode="r", zarr_format=3)
        except (FileNotFoundError, KeyError, ValueError, TypeError, ArithmeticError) as error:
            raise DamagedStoreError(f"{self.path / path} is not the array that it should be: {error}") from error
        return found


def _parquet(file: Path, filters: list[tuple[str, str, Any]] | None = None) -> pa.Table:
    try:
        return pq.read_table(file, partitioning=None, page_checksum_verification=True, filters=filters)
    except (OSError, pa.ArrowException) as error:
        raise DamagedStoreError(f"{file} cannot be read: {error}") from error


def _attributes(path: Path) -> Mapping[str, Any]:
    """The attributes of the Zarr group at ``path``; none where there is no group."""
    file = path / "zarr.json"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        if path.is_dir() and any(path.iterdir()):  # a store is not to be made among other things
            message = f"{path} holds no zarr.json, so it is no store: name one that 'spectrograph ingest' made"
            raise NotAStoreError(message) from None
        missing = "is empty" if path.is_dir() else "does not exist"
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
