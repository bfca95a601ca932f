"""Where a store keeps what, and in which shape. A store is a folder that is a Zarr v3 group:

    STORE/zarr.json                        model, recipe, versions              (written last when a store is made)
    STORE/basis/                           what depends on the weights alone
    STORE/batches/NAME/                    one array per captured thing, dense over the batch's images
    STORE/batches/NAME/heads/c/SHARD/...   one object per array and shard
    STORE/significant/NAME/SHARD.parquet   one row per image and neuron over its threshold, where that is captured
    STORE/images/NAME/SHARD.parquet        one row per image; its presence is what makes the shard exist
    STORE/fits/FIT/                        means, thresholds and directions of neurons, from a sample of images
    STORE/.staging/                        unfinished work, nobody reads it

Row ``i`` of a batch's arrays is the row ``i`` of its image table. A float that was not written reads as NaN.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import zarr
from zarr.abc.codec import ArrayBytesCodec, BytesBytesCodec
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec

from schemas.errors import PlanError
from schemas.manifest import Batch, Sizes
from schemas.recipe import Recipe

BATCHES: Final = "batches"
BASIS: Final = "basis"
IMAGES: Final = "images"
SIGNIFICANT: Final = "significant"
FITS: Final = "fits"
STAGING: Final = ".staging"

SIGNIFICANT_BYTES: Final = 6  # of one row of significant scores, about, compressed

_BATCH_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_CHUNK_BYTES: Final = 512 * 1024
_NEURONS_BYTES: Final = 256 * 1024  # of a chunk: one neuron is read at a time, but small chunks are slow to write
_CHUNK_IMAGES: Final = 1024
_SHARD_BYTES: Final = 256 * 1024**2
_SHARD_IMAGES: Final = 4096
_SHARD_STEP: Final = 256


@dataclass(frozen=True)
class ArraySpec:
    """One array of a batch: its first dimension is the image, the others are named here."""

    name: str
    dtype: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    chunk: tuple[int, ...]  # of the other dimensions, as one query reads them

    @property
    def image_bytes(self) -> int:
        """Bytes of one image, uncompressed."""
        return _items(self.shape) * int(self.dtype.removeprefix("float")) // 8


@dataclass(frozen=True)
class StaticSpec:
    """One static array, of float32, with the names of its dimensions."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]


def array_specs(sizes: Sizes, recipe: Recipe) -> tuple[ArraySpec, ...]:
    """The arrays of each batch of a store."""
    layers, heads, width, dim = sizes.layers, sizes.heads, sizes.coefficients, sizes.dim
    specs = [ArraySpec("representation", "float32", ("dim",), (dim,), (dim,))]
    if sizes.family == "vit":
        specs.append(ArraySpec("constants", "float32", ("term",), (sizes.terms,), (sizes.terms,)))
    captured: dict[str, list[tuple[str, tuple[str, ...], tuple[int, ...], tuple[int, ...]]]] = {
        "heads": [("heads", ("layer", "head", "coefficient"), (layers, heads, width), (1, 1, width))],
        "mlps": [
            ("mlps", ("layer", "dim"), (layers, dim), (1, dim)),
            ("embedding", ("dim",), (dim,), (dim,)),
        ],
        "cls_to_cls": [("cls_to_cls", ("layer", "dim"), (layers, dim), (1, dim))],
        "tokens": [
            (
                "tokens",
                ("layer", "head", "token", "coefficient"),
                (layers, heads, sizes.tokens, width),
                (1, 1, sizes.tokens, width),
            )
        ],
        "pairs": [("pairs", ("neuron", "head"), (sizes.neurons, heads), (1, heads))],
    }
    for capture in recipe.plain_captures:
        specs += [ArraySpec(name, recipe.dtype, dims, shape, chunk) for name, dims, shape, chunk in captured[capture]]
    specs += _neuron_specs(sizes, recipe)
    return tuple(specs)


def _neuron_specs(sizes: Sizes, recipe: Recipe) -> list[ArraySpec]:
    layers, direct = recipe.layers("neurons"), recipe.layers("direct")
    specs = []
    if recipe.level == "coefficients":
        for layer in layers:
            later = (sizes.layers - 1 - layer, sizes.heads)
            dims = ("neuron", f"layer_after_{layer}", "head")
            specs.append(ArraySpec(coefficients_name(layer), recipe.dtype, dims, (sizes.neurons, *later), (1, *later)))
    elif recipe.level == "scores":
        shape = (len(layers), sizes.neurons)
        specs += [
            ArraySpec(name, recipe.dtype, ("neuron_layer", "neuron"), shape, (1, 1))
            for name in ("neuron_norms", "neuron_projections")
        ]
    if direct:
        shape = (len(direct), sizes.neurons)
        specs.append(ArraySpec("direct", recipe.dtype, ("direct_layer", "neuron"), shape, (1, 1)))
    return specs


def coefficients_name(layer: int) -> str:
    """The array of the second-order coefficients of one layer's neurons: each layer has another number of them."""
    return f"neurons_{layer}"


def basis_specs(sizes: Sizes, recipe: Recipe) -> tuple[StaticSpec, ...]:
    """The arrays of a store's basis."""
    layers, heads, width, dim = sizes.layers, sizes.heads, sizes.coefficients, sizes.dim
    specs = [StaticSpec("heads", ("layer", "head", "coefficient", "dim"), (layers, heads, width, dim))]
    if sizes.family == "resnet":
        return (
            *specs,
            StaticSpec("pair_reads", ("neuron", "head", "coefficient"), (sizes.neurons, heads, width)),
            StaticSpec("value_biases", ("head", "dim"), (heads, dim)),
            StaticSpec("output_bias", ("dim",), (dim,)),
        )
    specs += [
        StaticSpec("norm_terms", ("term", "dim"), (sizes.terms, dim)),
        StaticSpec("bias_terms", ("layer", "term", "dim"), (layers, sizes.terms, dim)),
    ]
    neurons = recipe.layers("neurons")
    if recipe.output_layers:
        shape = (len(recipe.output_layers), sizes.neurons, sizes.width)
        specs.append(StaticSpec("neuron_outputs", ("output_layer", "neuron", "width"), shape))
        specs.append(StaticSpec("last_matrix", ("width", "dim"), (sizes.width, dim)))
    if neurons:
        reads = (layers - 1 - neurons[0], heads, sizes.width, width)
        specs.append(StaticSpec("neuron_reads", ("later_layer", "head", "width", "coefficient"), reads))
    return tuple(specs)


def image_bytes(specs: tuple[ArraySpec, ...]) -> int:
    """Bytes of one image over all arrays, uncompressed."""
    return sum(spec.image_bytes for spec in specs)


def dense_specs(model: Sizes, recipe: Recipe) -> tuple[ArraySpec, ...]:
    """The arrays by which shards are sized: significant scores may be all scores, in images unlike the fit's sample."""
    return array_specs(model, replace(recipe, level="scores") if recipe.level == "significant" else recipe)


def shard_images(specs: tuple[ArraySpec, ...], wanted: int | None, images: int) -> int:
    """How many images a shard of a batch holds: what was ``wanted``, or as many as fit 256 MiB.

    Sizes past 256 are rounded up to a multiple of it, so that a shard divides into chunks of many images.
    """
    size = wanted or max(1, min(_SHARD_IMAGES, _SHARD_BYTES // image_bytes(specs)))
    size = min(size, images)
    return size if size <= _SHARD_STEP else -(-size // _SHARD_STEP) * _SHARD_STEP


def create_array(store: Store, path: str, spec: ArraySpec, batch: Batch) -> zarr.Array[Any]:
    """Makes one array of a batch, empty: in the store itself, or in memory to encode a shard."""
    images = _chunk_images(spec, batch.shard_images)
    inner = (images, *_many_neurons(spec, images))
    codecs: list[ArrayBytesCodec | BytesBytesCodec] = [
        BytesCodec(),
        BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"),
        Crc32cCodec(),
    ]
    return zarr.create_array(
        store,
        name=path,
        shape=(batch.images, *spec.shape),
        dtype=spec.dtype,
        chunks=(batch.shard_images, *spec.shape),
        serializer=ShardingCodec(chunk_shape=inner, codecs=codecs),
        compressors=None,
        filters=None,
        fill_value=float("nan"),
        dimension_names=("image", *spec.dims),
    )


def shard_key(spec: ArraySpec, shard: int) -> str:
    """The object that holds one shard of an array, below the array."""
    return "/".join(["c", str(shard), *("0" for _ in spec.shape)])


def record_path(batch: str, shard: int) -> Path:
    """The Parquet file that makes a shard exist, below the store."""
    return Path(IMAGES) / batch / f"{shard:06d}.parquet"


def significant_path(batch: str, shard: int) -> Path:
    """The Parquet file of one shard's significant scores, below the store."""
    return Path(SIGNIFICANT) / batch / f"{shard:06d}.parquet"


def check_batch_name(name: str) -> str:
    """``name``, if it can name a folder and be typed.

    Raises:
        PlanError: it cannot.
    """
    if not _BATCH_NAME.fullmatch(name):
        raise PlanError(f"{name!r} cannot name a batch: use up to 100 letters, digits, '.', '_', '-', not '.' first")
    return name


def _chunk_images(spec: ArraySpec, shard: int) -> int:
    itemsize = int(spec.dtype.removeprefix("float")) // 8
    most = max(1, min(_CHUNK_IMAGES, _CHUNK_BYTES // (_items(spec.chunk) * itemsize)))
    return max(size for size in range(1, min(most, shard) + 1) if shard % size == 0)


def _many_neurons(spec: ArraySpec, images: int) -> tuple[int, ...]:
    """Puts as many neurons into one chunk as make it worth writing."""
    if "neuron" not in spec.dims:
        return spec.chunk
    axis = spec.dims.index("neuron")
    most = _NEURONS_BYTES // (images * replace(spec, shape=spec.chunk).image_bytes)
    sizes = range(1, min(max(1, most), spec.shape[axis]) + 1)
    neurons = max(size for size in sizes if spec.shape[axis] % size == 0)
    return (*spec.chunk[:axis], neurons, *spec.chunk[axis + 1 :])


def _items(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
