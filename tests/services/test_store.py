"""Reading: the papers' numbers from a store, any selection, and nothing read that was not asked for."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import LocalStore

import spectrograph
from schemas.errors import ComponentError, DamagedStoreError, SelectionError
from services.store import Store, open_store
from tests.conftest import Ingest


@pytest.fixture(scope="module")
def store(full_store: Path) -> Store:
    return open_store(full_store)


@pytest.fixture(scope="module")
def golden_store(golden_vit_store: Path) -> Store:
    return open_store(golden_vit_store)


def test_the_reference_view_is_that_of_the_papers_code(golden_store: Store, golden_vit: dict[str, np.ndarray]) -> None:
    heads = golden_store.heads(view="reference")
    mlps = np.concatenate(
        [golden_store.embedding(view="reference")[:, None], golden_store.mlps(view="reference")], axis=1
    )
    tokens = golden_store.tokens(view="reference")
    assert np.abs(heads - golden_vit["heads"]).max() < 1e-5
    assert np.abs(mlps - golden_vit["mlps"]).max() < 1e-5
    assert np.abs(golden_store.cls_to_cls(view="reference") - golden_vit["cls_to_cls"]).max() < 1e-5
    assert np.abs(tokens.sum(axis=(1, 2)) - golden_vit["tokens"]).max() < 1e-5
    unit = golden_vit["representation"] / np.linalg.norm(golden_vit["representation"], axis=1, keepdims=True)
    assert np.abs(heads.sum(axis=(1, 2)) + mlps.sum(axis=1) - unit).max() < 1e-5


def test_plain_contributions_and_the_constant_sum_to_the_representation(store: Store) -> None:
    total = sum(store.contribution(component) for component in store.components())
    np.testing.assert_allclose(total, store.representation(), atol=1e-5 * np.abs(store.representation()).max())


def test_tokens_sum_to_their_head(store: Store) -> None:
    np.testing.assert_allclose(store.tokens().sum(axis=3), store.heads(), atol=1e-5)
    reference = store.tokens(view="reference").sum(axis=3)
    np.testing.assert_allclose(reference, store.heads(view="reference"), atol=1e-6)


indices = st.one_of(st.none(), st.integers(-4, 3), st.lists(st.integers(-4, 3), min_size=1, max_size=5), st.slices(4))


@given(layer=indices, head=indices, data=st.data(), view=st.sampled_from(["plain", "reference"]))
@settings(max_examples=60, deadline=None)
def test_any_selection_equals_indexing_the_whole(
    store: Store, layer: object, head: object, data: st.DataObject, view: str
) -> None:
    ids = store.images()["image_id"].to_pylist()
    places = data.draw(st.one_of(st.none(), st.lists(st.integers(0, len(ids) - 1), max_size=6)))
    images = None if places is None else [ids[place] for place in places]
    whole = store.heads(view=view)
    rows = whole if places is None else whole[np.array(places, int)]
    along_layers = rows[:, slice(None) if layer is None else layer]
    axis = 1 if isinstance(layer, int) else 2
    index = (*(slice(None),) * axis, slice(None) if head is None else head)
    found = store.heads(layer=layer, head=head, images=images, view=view)
    np.testing.assert_allclose(found, along_layers[index], atol=1e-6)


def test_a_number_drops_its_dimension_and_a_sequence_keeps_it(store: Store) -> None:
    assert store.heads(layer=1).shape == (40, 4, 32)
    assert store.heads(layer=1, head=2).shape == (40, 32)
    assert store.heads(layer=[1], head=2).shape == (40, 1, 32)
    assert store.heads(layer=slice(2, None)).shape == (40, 2, 4, 32)
    assert store.mlps(layer=np.int64(3)).shape == (40, 32)
    assert store.tokens(layer=0, head=0).shape == (40, 17, 32)


def test_one_head_is_read_without_the_others(full_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, int]] = []
    stock = LocalStore.get

    async def counted(self, key, prototype=None, byte_range=None):
        found = await stock(self, key, prototype, byte_range)
        read.append((key, 0 if found is None else len(found)))
        return found

    monkeypatch.setattr(LocalStore, "get", counted)
    store = open_store(full_store)
    store.heads(layer=2, head=1)
    one = sum(size for key, size in read if "default/heads/c/" in key)
    read.clear()
    store.heads()
    assert one < sum(size for key, size in read if "default/heads/c/" in key) / 4
    assert not any("tokens" in key or "mlps" in key for key, _ in read)


def test_components_are_found_by_name(store: Store) -> None:
    np.testing.assert_array_equal(store.contribution("head:2.1"), store.heads(layer=2, head=1))
    np.testing.assert_array_equal(store.contribution("mlp:3", view="reference"), store.mlps(layer=3, view="reference"))
    np.testing.assert_array_equal(store.contribution(spectrograph.component("embedding")), store.embedding())
    with pytest.raises(ComponentError, match="not neurons: ingest with --capture neurons:LAYERS"):
        store.contribution("neuron:1.2")
    with pytest.raises(ComponentError, match="shares the constant out"):
        store.contribution("constant", view="reference")


@pytest.mark.parametrize("layer", [4, -5, "1", 1.5, [0, 9], [[0]], True])
def test_layers_that_are_not_there_are_refused(store: Store, layer: object) -> None:
    with pytest.raises(SelectionError, match="layer"):
        store.heads(layer=layer)


def test_unknown_images_and_views_are_refused(store: Store) -> None:
    with pytest.raises(SelectionError, match="ids look like 'default/"):
        store.heads(images=["nobody"])
    with pytest.raises(SelectionError, match="choose 'plain' or 'reference'"):
        store.heads(view="mine")


def test_what_was_not_captured_is_said(ingest: Ingest) -> None:
    ingest(recipe=type(ingest.request.recipe).of(["mlps"], dtype="float16", precision="fp32"))
    store = open_store(ingest.request.store)
    with pytest.raises(ComponentError, match="captured mlps, not heads: ingest with --capture heads"):
        store.heads()
    assert store.mlps().dtype == np.float32
    assert store.coefficients("mlps").dtype == np.float16


def test_an_unfinished_store_shows_its_finished_shards(ingest: Ingest) -> None:
    ingest()
    (ingest.request.store / "images" / "default" / "000001.parquet").unlink()
    store = open_store(ingest.request.store)
    assert store.images().num_rows == len(store.heads()) == 24
    assert np.isfinite(store.heads()).all()


def test_a_store_that_holds_nothing_yet_is_empty(ingest: Ingest) -> None:
    ingest()
    shutil.rmtree(ingest.request.store / "images")
    store = open_store(ingest.request.store)
    assert store.images().num_rows == 0
    assert store.heads().shape == (0, 4, 4, 32)


@pytest.mark.parametrize("harm", ["missing", "empty", "flipped bit", "cut short"])
def test_damage_is_an_error_that_names_the_file_and_never_zeros(ingest: Ingest, harm: str) -> None:
    ingest()
    file = ingest.request.store / "batches" / "default" / "heads" / "c" / "1" / "0" / "0" / "0"
    data = bytearray(file.read_bytes())
    if harm == "missing":
        file.unlink()
    else:
        data[len(data) // 2] ^= 4
        file.write_bytes({"empty": b"", "flipped bit": bytes(data), "cut short": bytes(data[:-9])}[harm])
    with pytest.raises(DamagedStoreError, match="heads/c/1/0/0/0 is"):
        open_store(ingest.request.store).heads()


def test_a_damaged_record_is_named(ingest: Ingest) -> None:
    ingest()
    (ingest.request.store / "images" / "default" / "000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DamagedStoreError, match=r"000001\.parquet cannot be read"):
        open_store(ingest.request.store).images()
