"""Means, thresholds and directions: the papers' numbers, and the vectors' by brute force."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import ComponentError, DamagedStoreError, PlanError, PrecisionError, SelectionError
from schemas.store import StoreFolder
from services.fitting import fit_neurons, fit_store
from services.store import Store, open_store
from services.stored import StoredImages
from tests.conftest import Ingest
from workers.shards import add_fit
from workers.staging import Staging


@pytest.fixture(scope="module")
def vit(golden_vit_store: Path) -> Store:
    return fitted(golden_vit_store)


@pytest.fixture(scope="module")
def resnet(golden_resnet_store: Path) -> Store:
    return fitted(golden_resnet_store)


def fitted(path: Path) -> Store:
    folder = StoreFolder.open(path)
    add_fit(folder, fit_store(StoredImages(folder), sample=1000, top_k=20))
    return open_store(path)


def cosines(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(truth, axis=-1)
    return (found * truth).sum(axis=-1) / lengths


def test_golden_pair_norms_and_directions(resnet: Store, golden_resnet: dict[str, np.ndarray]) -> None:
    norms = resnet.pairs(what="norms").swapaxes(1, 2)  # (N, H, C)
    truth = golden_resnet["pair_norms"]
    assert np.abs(norms - truth).max() < 1e-4 * truth.max()
    directions = resnet.directions(head=slice(None)).swapaxes(0, 1)  # (H, C, D)
    cosine = cosines(directions, golden_resnet["pair_pcs"])
    assert (np.abs(cosine) > 0.9999).all()
    projections = resnet.pairs(what="projections").swapaxes(1, 2)  # (N, H, C)
    largest = np.argsort(-norms, axis=0)[:20]
    along = (np.take_along_axis(projections, largest, 0) > 0).sum(axis=0)  # (H, C)
    assert (along >= 10).all()
    assert (cosine[along > 10] > 0.9999).all(), "the reference's sign, wherever its majority rule is no tie"
    assert (along > 10).mean() > 0.8


def test_golden_pair_means(resnet: Store, golden_resnet: dict[str, np.ndarray]) -> None:
    means = resnet.pairs(view="reference").mean(axis=0).swapaxes(0, 1)  # (H, C, D)
    assert np.abs(means - golden_resnet["pair_means"]).max() < 1e-6 * np.abs(golden_resnet["pair_means"]).max()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_golden_neuron_norms_and_directions(vit: Store, golden_second_order: dict[str, np.ndarray], layer: int) -> None:
    truth = golden_second_order[f"norms_layer{layer}"]  # (N, n), with the vector common to all neurons
    assert np.abs(vit.neurons(layer, what="norms") - truth).max() < 0.02 * truth.mean()
    cosine = cosines(vit.directions(layer), golden_second_order[f"pc_layer{layer}"])
    assert (np.abs(cosine) > 0.999).mean() > 0.97
    assert (cosine > 0.999).mean() > 0.95
    assert (np.linalg.norm(vit.directions(layer), axis=1) - 1).max() < 1e-5
    thresholds = vit.fit().thresholds(layer)
    smallest = golden_second_order[f"top_norms_layer{layer}"].min(axis=1)
    assert np.abs(thresholds - smallest).max() < 0.02 * truth.mean()


def test_golden_concept_ratios_follow_from_pairs(resnet: Store, golden_resnet: dict[str, np.ndarray]) -> None:
    """The papers' shift measure: the share of the representation that a concept's five best pairs carry."""
    directions, pairs = resnet.directions(head=slice(None)), resnet.pairs(view="reference")  # (C, H, D), (N, C, H, D)
    norms = np.linalg.norm(resnet.representation(), axis=1)
    for concept in range(5):
        heads = golden_resnet["concept_top_pairs_head"][concept]
        neurons = golden_resnet["concept_top_pairs_neuron"][concept]
        ratio = np.linalg.norm(pairs[:, neurons, heads].sum(axis=1), axis=1) / norms
        np.testing.assert_allclose(ratio, golden_resnet["concept_ratio"][concept], rtol=1e-3)
        alike = directions[neurons, heads] @ golden_resnet["text"][concept]
        assert (np.abs(alike) > np.quantile(np.abs(directions @ golden_resnet["text"][concept]), 0.98)).all()


@given(
    count=st.integers(1, 6),
    images=st.integers(3, 30),
    dim=st.integers(2, 9),
    seed=st.integers(0, 99),
    data=st.data(),
)
@settings(deadline=None, max_examples=80)
def test_a_fit_in_coefficients_is_that_of_the_vectors(
    count: int, images: int, dim: int, seed: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, images - 1))
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(2, count, dim))
    numbers = rng.normal(size=(2, images, count))
    gram = rows @ rows.swapaxes(1, 2) + 1e-13 * np.eye(count)
    found = fit_neurons(numbers, np.linalg.cholesky(gram), top_k)
    for neuron in range(2):
        vectors = (numbers[neuron] - numbers[neuron].mean(axis=0)) @ rows[neuron]  # (S, D)
        norms = np.linalg.norm(vectors, axis=1)
        largest = vectors[np.argsort(-norms)[:top_k]]
        _, values, right = np.linalg.svd(largest, full_matrices=False)
        direction = found.directions[neuron] @ rows[neuron]
        assert found.thresholds[neuron] == pytest.approx(np.sort(norms)[-top_k], rel=1e-4, abs=1e-5)
        assert np.linalg.norm(direction) == pytest.approx(1, abs=1e-4)
        assert found.explained[neuron] == pytest.approx(values[0] ** 2 / (values**2).sum(), rel=1e-4)
        if len(values) == 1 or values[1] < 0.98 * values[0]:
            assert abs(direction @ right[0]) > 0.999
        assert (largest @ direction > 0).sum() >= top_k / 2


def test_a_neuron_that_never_changes_has_no_direction() -> None:
    found = fit_neurons(np.ones((1, 6, 2)), np.eye(2)[None], 3)
    assert (found.directions == 0).all()
    assert 0 < found.thresholds[0] < 1e-30, "so that no change at all is not over it"
    assert (found.explained == 0).all()


def test_the_same_sample_gives_the_same_fit_and_another_another(golden_resnet_store: Path) -> None:
    stored = StoredImages(StoreFolder.open(golden_resnet_store))
    first, again = (fit_store(stored, sample=16, top_k=4) for _ in range(2))
    assert first.name == again.name
    np.testing.assert_array_equal(first.arrays["pair_signs"], again.arrays["pair_signs"])
    assert fit_store(stored, sample=17, top_k=4).name != first.name
    assert fit_store(stored, sample=16, top_k=5).name != first.name


def test_fits_are_kept_side_by_side_and_the_latest_counts(golden_resnet_store: Path) -> None:
    folder = StoreFolder.open(golden_resnet_store)
    stored = StoredImages(folder)
    names = []
    for top_k in (3, 2):
        fit = fit_store(stored, sample=16, top_k=top_k)
        add_fit(folder, fit)
        names.append(fit.name)
    store = open_store(golden_resnet_store)
    assert store.fits()[-2:] == names
    assert store.fit().name == names[1]
    assert store.fit(names[0]).top_k == 3
    one, other = (store.pairs(neuron=3, what="projections", fit=name) for name in names)
    assert one.shape == other.shape == (32, 4)
    with pytest.raises(SelectionError, match=f"no fit 'x'; it has .*{names[1]}"):
        store.pairs(neuron=3, what="norms", fit="x")


def test_a_fit_that_is_repeated_is_there_all_the_time(
    golden_resnet_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = StoreFolder.open(golden_resnet_store)
    fit = fit_store(StoredImages(folder), sample=16, top_k=6)
    add_fit(folder, fit)
    monkeypatch.setattr(Staging, "publish_folder", lambda *_: pytest.fail("the fit is not there for a while"))
    again = fit_store(StoredImages(folder), sample=16, top_k=6)
    add_fit(folder, again)
    assert folder.fit().created == again.created > fit.created


def test_a_fit_of_no_numbers_is_not_kept(golden_resnet_store: Path) -> None:
    folder = StoreFolder.open(golden_resnet_store)
    fit = fit_store(StoredImages(folder), sample=16, top_k=7)
    fit.arrays["means_0"][0, 0] = np.inf
    with pytest.raises(PrecisionError, match="holds numbers past float32"):
        add_fit(folder, fit)
    assert fit.name not in folder.fit_names()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [10**7, 10**6]}, "not float32"),
        ({"shape": "x"}, "is not the array that it should be"),
        ({"data_type": "float64"}, "not float32"),
    ],
)
def test_arrays_of_a_fit_that_are_not_what_they_should_be_are_named(
    golden_resnet_store: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    shutil.copytree(golden_resnet_store, tmp_path / "store")
    folder = StoreFolder.open(tmp_path / "store")
    fit = fit_store(StoredImages(folder), sample=16, top_k=6)
    add_fit(folder, fit)
    file = folder.path / "fits" / fit.name / "means_0" / "zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(DamagedStoreError, match=message):
        folder.fit()


def test_a_damaged_fit_is_named(ingest: Ingest) -> None:
    recipe = ingest.request.recipe.of(["neurons:2"], dtype="float16", precision="fp32")
    ingest(recipe=recipe)
    folder = StoreFolder.open(ingest.request.store)
    fit = fit_store(StoredImages(folder), sample=40, top_k=5)
    add_fit(folder, fit)
    chunk = folder.path / "fits" / fit.name / "means_2" / "c" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(DamagedStoreError, match="means_2 is damaged"):
        open_store(folder.path).fit()
    (folder.path / "fits" / fit.name / "zarr.json").write_text('{"attributes": {"spectrograph": {"layers": []}}}')
    with pytest.raises(DamagedStoreError, match="does not describe a fit"):
        open_store(folder.path).fits()


@pytest.mark.parametrize(
    ("sample", "top_k", "message"),
    [
        (40, 40, "are all of them: fit more images, or add --top-k"),
        (-5, 1, "--sample -5 tells nothing: give at least 2"),
        (40, 0, "--top-k 0 tells nothing: give at least 1"),
    ],
)
def test_samples_that_tell_nothing_are_refused(ingest: Ingest, sample: int, top_k: int, message: str) -> None:
    ingest(recipe=ingest.request.recipe.of(["neurons:2"], dtype="float16", precision="fp32"))
    with pytest.raises(PlanError, match=message):
        fit_store(StoredImages(StoreFolder.open(ingest.request.store)), sample, top_k)


def test_a_store_without_neurons_cannot_be_fitted(ingest: Ingest) -> None:
    ingest()
    with pytest.raises(ComponentError, match="captured heads, mlps, not neurons: ingest with --capture neurons:LAYERS"):
        fit_store(StoredImages(StoreFolder.open(ingest.request.store)), 40, 2)
