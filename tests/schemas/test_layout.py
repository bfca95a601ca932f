from dataclasses import replace

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.storage import MemoryStore

from schemas.errors import PlanError
from schemas.layout import ArraySpec, array_specs, check_batch_name, create_array, image_bytes, shard_images
from schemas.manifest import Batch, Model
from schemas.recipe import Recipe


def model(**changes: int) -> Model:
    sizes = {"layers": 12, "heads": 12, "coefficients": 64, "tokens": 50, "dim": 512, "terms": 3}
    sizes |= {"neurons": 3072, "width": 768, **changes}
    return Model(family="vit", name="m", pretrained=None, fingerprint="f", config={}, preprocessing={}, **sizes)


def recipe(*capture: str, level: str = "coefficients") -> Recipe:
    return Recipe.of(capture, dtype="float16", precision="fp32", level=level)


def test_heads_take_a_sixteenth_of_the_dense_float32_of_the_references() -> None:
    heads = next(spec for spec in array_specs(model(), recipe("heads")) if spec.name == "heads")
    assert heads.image_bytes * 16 == 12 * 12 * 512 * 4


def test_neurons_and_pairs_take_what_was_promised_of_the_dense_float32() -> None:
    dense = 3072 * 512 * 4
    assert named("neurons:9", "neurons_9").image_bytes * 42 < dense
    scores = array_specs(model(), recipe("neurons:9", level="scores"))
    assert sum(spec.image_bytes for spec in scores if spec.name.startswith("neuron")) * 512 == dense
    rn50 = replace(model(layers=1, heads=32, dim=1024, neurons=2048), family="resnet")
    pairs = next(spec for spec in array_specs(rn50, recipe("pairs")) if spec.name == "pairs")
    assert pairs.image_bytes * 2048 == 2048 * 32 * 1024 * 4


def named(capture: str, name: str) -> ArraySpec:
    return next(spec for spec in array_specs(model(), recipe(capture)) if spec.name == name)


@pytest.mark.parametrize("images", [54, 1500, 4096])
@pytest.mark.parametrize("layer", [0, 5, 10])
def test_a_neuron_lies_in_chunks_that_are_neither_small_nor_wasteful(layer: int, images: int) -> None:
    spec = named(f"neurons:{layer}", f"neurons_{layer}")
    size = shard_images((spec,), images, images)
    array = create_array(MemoryStore(), spec.name, spec, Batch("s", images, size, "", ""))
    assert array.shards[1:] == spec.shape
    chunk = np.prod(array.chunks) * 2
    assert 32 * 1024 <= chunk <= 600 * 1024
    assert array.chunks[1] <= 256, "one neuron is read at a time"


@given(wanted=st.one_of(st.none(), st.integers(1, 10_000)), images=st.integers(1, 10_000))
def test_shards_cover_all_images_once(wanted: int | None, images: int) -> None:
    size = shard_images(array_specs(model(), recipe("heads", "mlps")), wanted, images)
    batch = Batch("s", images, size, "", "")
    rows = [row for shard in range(batch.shards) for row in batch.rows(shard)]
    assert rows == list(range(images))


@given(wanted=st.integers(1, 700), images=st.integers(1, 1500))
def test_chunks_divide_shards(wanted: int, images: int) -> None:
    for spec in array_specs(model(layers=2, heads=2, coefficients=4, dim=8), recipe("heads")):
        batch = Batch("s", images, shard_images((spec,), wanted, images), "", "")
        array = create_array(MemoryStore(), spec.name, spec, batch)
        assert array.shards[0] % array.chunks[0] == 0
        assert array.chunks[0] * 64 >= min(array.shards[0], 1024), "chunks of few images are slow"


def test_large_captures_make_small_shards() -> None:
    specs = array_specs(model(), recipe("heads", "mlps", "tokens"))
    assert 1 <= shard_images(specs, None, 10**6) * image_bytes(specs) <= 2 * 256 * 1024**2


def test_what_is_not_written_reads_as_nan_and_dimensions_are_named() -> None:
    spec = array_specs(model(), recipe("heads"))[-1]
    array = create_array(MemoryStore(), spec.name, spec, Batch("s", 10, 4, "", ""))
    assert np.isnan(array[:]).all()
    assert array.metadata.dimension_names == ("image", "layer", "head", "coefficient")


def test_a_flipped_bit_is_an_error() -> None:
    objects: dict[str, object] = {}
    spec = array_specs(model(), recipe("heads"))[0]
    array = create_array(MemoryStore(objects), spec.name, spec, Batch("s", 4, 4, "", ""))
    array[:] = np.random.default_rng(0).normal(size=array.shape)
    key = "representation/c/0/0"
    data = bytearray(objects[key].to_bytes())
    data[len(data) // 3] ^= 1
    objects[key] = zarr.buffer.cpu.Buffer.from_bytes(bytes(data))
    with pytest.raises(ValueError, match="checksum"):
        array[:]


@pytest.mark.parametrize("name", ["", "..", ".x", "a/b", "a b", "ü", "-x", "x" * 101, "a\n"])
def test_names_that_could_leave_the_store_are_refused(name: str) -> None:
    with pytest.raises(PlanError, match="cannot name a batch"):
        check_batch_name(name)


def test_common_batch_names_pass() -> None:
    assert [check_batch_name(name) for name in ("default", "2026-11-21", "site_3.b")]
