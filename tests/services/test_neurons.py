"""Neurons and pairs read from stores: the three levels agree, and any selection is that of the whole."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from schemas.errors import ComponentError, DamagedStoreError, PlanError, SelectionError, StoreMismatchError
from schemas.recipe import Recipe
from schemas.store import StoreFolder
from services.fitting import fit_store
from services.neurons import Neurons
from services.store import Store, open_store
from services.stored import StoredImages
from services.verify import verify_checksums, verify_sample
from tests.conftest import GOLDEN, Ingest
from workers.shards import add_fit
from workers.vit import VitDecomposition

LAYERS = (0, 2)


def capturing(*capture: str, dtype: str = "float32", level: str = "coefficients") -> Recipe:
    return Recipe.of(capture, dtype=dtype, precision="fp32", level=level)


@pytest.fixture(scope="module")
def levels(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """The same images kept in each way, by one fit; shards of 16 and of 7 images."""
    folder = tmp_path_factory.mktemp("levels")
    base = Ingest(_request(scenes, folder / "coefficients", capturing("mlps", "neurons:0+2", "direct:1-3")))
    base()
    whole = StoreFolder.open(folder / "coefficients")
    add_fit(whole, fit_store(StoredImages(whole), sample=40, top_k=6))
    for level in ("scores", "significant"):
        recipe = capturing("neurons:0+2", level=level)
        base(store=folder / level, recipe=recipe, fit=whole.path, shard_images=7, batch_size=5)
    return {level: open_store(folder / level) for level in ("coefficients", "scores", "significant")}


def _request(scenes: Path, store: Path, recipe: Recipe) -> object:
    from workers.request import Request  # noqa: PLC0415

    return Request(scenes, store, str(GOLDEN / "vit"), None, "default", recipe, "cpu", 8, 16)


@pytest.mark.parametrize("layer", LAYERS)
def test_scores_that_were_kept_are_those_of_the_coefficients(levels: dict[str, Store], layer: int) -> None:
    for what in ("norms", "projections"):
        truth = levels["coefficients"].neurons(layer, what=what)
        np.testing.assert_allclose(levels["scores"].neurons(layer, what=what), truth, atol=1e-4 * np.abs(truth).max())
    vectors = levels["coefficients"].neurons(layer, view="reference")
    centred = vectors - vectors.mean(axis=0)
    np.testing.assert_allclose(
        levels["scores"].neurons(layer, what="norms"),
        np.linalg.norm(centred, axis=2),
        atol=1e-4 * np.abs(centred).max(),
    )
    along = np.einsum("bnd,nd->bn", centred, levels["scores"].directions(layer))
    np.testing.assert_allclose(levels["scores"].neurons(layer, what="projections"), along, atol=1e-4)


@pytest.mark.parametrize("layer", LAYERS)
def test_significant_scores_are_those_over_the_threshold(levels: dict[str, Store], layer: int) -> None:
    norms = levels["scores"].neurons(layer, what="norms")
    kept = levels["significant"].neurons(layer, what="norms")
    over = norms >= levels["scores"].fit().thresholds(layer)
    near = np.isclose(norms, levels["scores"].fit().thresholds(layer), rtol=1e-4)
    assert (np.isfinite(kept) == over)[~near].all()
    assert 0.1 < np.isfinite(kept).mean() < 0.2, "6 of 40"
    np.testing.assert_allclose(kept[np.isfinite(kept)], norms[np.isfinite(kept)], rtol=1e-4)
    some = levels["significant"].images()["image_id"].to_pylist()[3:30:4]
    order = [some[2], some[0], some[2]]
    again = levels["significant"].neurons(layer, [7, 3, 7], what="projections", images=order)
    whole = levels["significant"].neurons(layer, what="projections")
    np.testing.assert_array_equal(again, whole[[11, 3, 11]][:, [7, 3, 7]])


def test_significant_images_are_listed_alike_by_every_level(levels: dict[str, Store]) -> None:
    tables = {level: store.significant(2, [5, 9]) for level, store in levels.items()}
    for table in tables.values():
        assert table.column_names == ["image_id", "layer", "neuron", "norm", "projection"]
        assert table.num_rows == 12, "the six largest of each"
        assert table["neuron"].to_pylist() == sorted(table["neuron"].to_pylist())
        assert table["norm"].to_pylist()[:5] == sorted(table["norm"].to_pylist()[:5], reverse=True)
    first = [set(table["image_id"].to_pylist()[:5]) for table in tables.values()]
    assert first[0] == first[1] == first[2]


def test_direct_effects_sum_to_mlps_up_to_a_vector_of_the_layer(levels: dict[str, Store]) -> None:
    store = levels["coefficients"]
    for layer in (1, 3):
        rest = store.mlps(layer=layer) - store.neurons(layer, effect="direct").sum(axis=1)
        scales = np.linalg.norm(rest, axis=1, keepdims=True)
        assert np.abs(rest / scales - (rest / scales)[0]).max() < 1e-4, "a bias, scaled by each image"
    assert store.neurons(1, 4, effect="direct").shape == (40, 32)


indices = st.one_of(st.none(), st.integers(-4, 3), st.lists(st.integers(-4, 3), min_size=1, max_size=4), st.slices(4))


@given(neuron=indices, data=st.data(), view=st.sampled_from(["plain", "reference"]))
@settings(max_examples=40, deadline=None)
def test_any_selection_of_neurons_equals_indexing_the_whole(
    levels: dict[str, Store], neuron: object, data: st.DataObject, view: str
) -> None:
    store = levels["coefficients"]
    ids = store.images()["image_id"].to_pylist()
    chosen = data.draw(st.none() | st.lists(st.integers(0, 39), min_size=1, max_size=5))
    picked = None if chosen is None else [ids[at] for at in chosen]
    which = slice(None) if neuron is None else neuron
    whole = store.neurons(2, view=view)
    expected = (whole if chosen is None else whole[chosen])[:, which]
    found = store.neurons(2, neuron, images=picked, view=view)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(whole).max())


def test_any_shard_and_batch_size_gives_the_same_numbers(levels: dict[str, Store], ingest: Ingest) -> None:
    ingest(recipe=capturing("neurons:0+2", "direct:1-3"), shard_images=9, batch_size=40)
    for name in ("neurons_0", "neurons_2", "direct"):
        truth = levels["coefficients"].coefficients(name)
        found = open_store(ingest.request.store).coefficients(name)
        np.testing.assert_allclose(found, truth, atol=1e-5 * np.abs(truth).max())


def test_float16_costs_half_a_unit_in_the_last_place(levels: dict[str, Store], ingest: Ingest) -> None:
    ingest(recipe=capturing("neurons:0+2", dtype="float16"))
    truth = levels["coefficients"].neurons(0)
    away = np.linalg.norm(open_store(ingest.request.store).neurons(0) - truth, axis=2)
    assert (away <= 1e-3 * np.linalg.norm(truth, axis=2)).mean() > 0.99
    assert away.max() < 1e-3 * np.linalg.norm(truth, axis=2).max()


def test_components_by_name(levels: dict[str, Store], golden_resnet_store: Path) -> None:
    store = levels["coefficients"]
    np.testing.assert_array_equal(store.contribution("neuron:2.7"), store.neurons(2, 7))
    resnet = open_store(golden_resnet_store)
    np.testing.assert_array_equal(resnet.contribution("pair:7.3"), resnet.pairs(neuron=7, head=3))
    np.testing.assert_array_equal(resnet.contribution("neuron:0.7"), resnet.neurons(neuron=7))


def test_pairs_and_the_constant_sum_to_the_representation(golden_resnet_store: Path) -> None:
    store = open_store(golden_resnet_store)
    truth = store.representation()
    scale = np.linalg.norm(truth, axis=1).min()
    assert np.abs(store.pairs().sum(axis=(1, 2)) + store.constant() - truth).max() < 1e-5 * scale
    assert np.abs(store.pairs(view="reference").sum(axis=(1, 2)) - truth).max() < 1e-5 * scale
    assert np.abs(store.neurons(view="reference").sum(axis=1) - truth).max() < 1e-5 * scale
    np.testing.assert_allclose(store.neurons(neuron=9), store.pairs(neuron=9).sum(axis=1), atol=1e-5)
    assert len(store.components()) == 256 * 4 + 1


def test_verify_knows_pairs_and_scores(ingest: Ingest, levels: dict[str, Store]) -> None:
    ingest(model=str(GOLDEN / "resnet"), recipe=capturing("pairs", dtype="float16"))
    store = open_store(ingest.request.store)
    assert verify_checksums(store.folder).problems == ()
    sample = verify_sample(store, 4, "cpu")
    assert sample.problems == ()
    assert sample.total is not None
    assert sample.total < 1e-3
    assert verify_checksums(levels["significant"].folder).problems == ()
    assert verify_checksums(levels["significant"].folder).objects == 6 * 3


@pytest.mark.parametrize("level", ["coefficients", "scores"])
def test_verify_encodes_neurons_anew(levels: dict[str, Store], monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    sample = verify_sample(levels[level], 5, "cpu")
    assert sample.problems == ()
    assert sample.neurons is not None
    assert sample.neurons < 1e-4
    encode = VitDecomposition.encode

    def other(self: VitDecomposition, images: torch.Tensor) -> dict[str, torch.Tensor]:
        found = encode(self, images)
        return {name: values * (1.01 if name.startswith("neuron") else 1) for name, values in found.items()}

    monkeypatch.setattr(VitDecomposition, "encode", other)
    problems = verify_sample(levels[level], 5, "cpu").problems
    assert len(problems) == 5 * 2
    assert all("of its norm away from what the model gives" in problem for problem in problems)


def test_a_missing_or_changed_table_of_scores_is_found(ingest: Ingest, levels: dict[str, Store]) -> None:
    recipe = capturing("neurons:0+2", level="significant")
    ingest(recipe=recipe, fit=levels["coefficients"].folder.path)
    file = ingest.request.store / "significant" / "default" / "000001.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    problems = verify_checksums(StoreFolder.open(ingest.request.store)).problems
    assert problems == (f"{file} is not what was written: its checksum differs",)
    file.unlink()
    with pytest.raises(DamagedStoreError, match="run 'spectrograph verify'"):
        open_store(ingest.request.store).neurons(0, 3, what="norms")


def test_an_interrupted_run_of_scores_goes_on_without_naming_its_fit(ingest: Ingest, levels: dict[str, Store]) -> None:
    recipe = capturing("neurons:0+2", level="significant")
    ingest(recipe=recipe, fit=levels["coefficients"].folder.path)
    last = ingest.request.store / "images" / "default" / "000002.parquet"
    before = last.read_bytes(), (ingest.request.store / "significant/default/000002.parquet").read_bytes()
    last.unlink()
    ingest(recipe=recipe)
    assert (last.read_bytes(), (ingest.request.store / "significant/default/000002.parquet").read_bytes()) == before


def test_scores_need_a_fit_of_the_same_model_and_layers(ingest: Ingest, levels: dict[str, Store]) -> None:
    fit = levels["coefficients"].folder.path
    scores = capturing("neurons:0+2", level="scores")
    with pytest.raises(PlanError, match="only by a fit: ingest a sample with coefficients"):
        ingest(recipe=scores)
    with pytest.raises(PlanError, match=r"the fit in .* has no layer 1: it has 0, 2"):
        ingest(recipe=capturing("neurons:0-2", level="scores"), fit=fit)
    with pytest.raises(StoreMismatchError, match=r"the fit in .* was made otherwise: model weights .* asked for"):
        ingest(recipe=scores, fit=fit, model="toy-vit")
    with pytest.raises(PlanError, match="has no layer 1"):
        ingest(recipe=capturing("neurons:all", level="scores"), fit=fit)
    with pytest.raises(StoreMismatchError, match="precision fp32 in the store, bf16 asked for"):
        ingest(recipe=replace(scores, precision="bf16"), fit=fit)
    with pytest.raises(PlanError, match="add --neurons scores, or leave out --fit"):
        ingest(recipe=capturing("neurons:0"), fit=fit)
    with pytest.raises(PlanError, match="only neurons can be kept as scores"):
        capturing("heads", level="scores")
    assert not ingest.request.store.exists()


def test_a_second_fit_does_not_enter_a_store_of_scores(ingest: Ingest, levels: dict[str, Store]) -> None:
    fit = levels["coefficients"].folder.path
    recipe = capturing("neurons:0+2", level="scores")
    ingest(recipe=recipe, fit=fit)
    other = StoreFolder.open(ingest.request.store.parent / "store")
    with pytest.raises(StoreMismatchError, match="neurons as scores in the store, significant asked for"):
        ingest(recipe=replace(recipe, level="significant"), fit=fit)
    store = open_store(other.path)
    with pytest.raises(SelectionError, match="were made by the fit"):
        store.neurons(0, what="norms", fit="abc")
    with pytest.raises(ComponentError, match="keeps neurons as scores: contributions need coefficients"):
        store.neurons(0, 1)
    with pytest.raises(ComponentError, match="fit a store that keeps coefficients"):
        fit_store(StoredImages(other), 40, 2)


def test_a_run_of_scores_goes_on_after_its_fit_was_repeated_or_removed(
    ingest: Ingest, levels: dict[str, Store], tmp_path: Path
) -> None:
    recipe, fit = capturing("neurons:0+2", level="scores"), tmp_path / "fit"
    shutil.copytree(levels["coefficients"].folder.path, fit)
    ingest(recipe=recipe, fit=fit)
    folder = StoreFolder.open(fit)
    add_fit(folder, fit_store(StoredImages(folder), sample=40, top_k=9))
    ingest(recipe=recipe, fit=fit)
    (fit / "fits" / levels["coefficients"].fits()[0] / "zarr.json").unlink()
    with pytest.raises(StoreMismatchError, match=r"were made by the fit .* does not have: name another store"):
        ingest(recipe=recipe, fit=fit)
    shutil.rmtree(fit)
    assert ingest(recipe=recipe, fit=fit).stored == 40


def test_scores_whose_fit_is_gone_are_damaged(ingest: Ingest, levels: dict[str, Store]) -> None:
    recipe = capturing("neurons:0+2", level="scores")
    ingest(recipe=recipe, fit=levels["coefficients"].folder.path)
    shutil.rmtree(ingest.request.store / "fits")
    problems = verify_checksums(StoreFolder.open(ingest.request.store)).problems
    assert len(problems) == 1
    assert "has lost the fit" in problems[0]
    with pytest.raises(DamagedStoreError, match="has lost the fit"):
        ingest(recipe=recipe, batch="another")


def test_a_fit_of_another_configuration_of_the_same_weights_is_refused(
    ingest: Ingest, levels: dict[str, Store], tmp_path: Path
) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(GOLDEN / "vit", twin)
    config = json.loads((twin / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = not config["model_cfg"].get("quick_gelu", False)
    (twin / "open_clip_config.json").write_text(json.dumps(config))
    recipe = capturing("neurons:0+2", level="scores")
    with pytest.raises(StoreMismatchError, match="model config"):
        ingest(model=str(twin), recipe=recipe, fit=levels["coefficients"].folder.path)
    config["model_cfg"]["vision_cfg"]["head_width"] = 4
    (twin / "open_clip_config.json").write_text(json.dumps(config))
    ingest()
    with pytest.raises(StoreMismatchError, match="model config"):
        ingest(model=str(twin))


def test_scoring_that_does_not_fit_the_memory_is_refused_unless_forced(
    ingest: Ingest, levels: dict[str, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.fit_planning._memory_bytes", lambda _: 100_000)
    recipe, fit = capturing("neurons:0+2", level="scores"), levels["coefficients"].folder.path
    with pytest.raises(PlanError, match=r"holds 0\.0 GB in memory, of 0\.0 GB: capture fewer layers at a time"):
        ingest(recipe=recipe, fit=fit)
    assert ingest(recipe=recipe, fit=fit, force=True).stored == 40


@pytest.mark.parametrize("level", ["coefficients", "scores", "significant"])
def test_empty_selections_are_empty(levels: dict[str, Store], level: str) -> None:
    store = levels[level]
    assert store.neurons(0, what="norms", images=[]).shape == (0, 256)
    assert store.neurons(0, [], what="projections").shape == (40, 0)
    assert store.significant(0, []).num_rows == 0
    assert store.directions(0, neuron=[]).shape == (0, 32)


def test_a_refit_in_between_does_not_mix_fits(
    levels: dict[str, Store], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(levels["coefficients"].folder.path, tmp_path / "copy")
    folder = StoreFolder.open(tmp_path / "copy")
    store = open_store(folder.path)
    whole = store.significant(0)
    monkeypatch.setattr("workers.effects._BLOCK_BYTES", 20_000)
    scores = Neurons.scores

    def refitted(self: Neurons, *args: object) -> object:
        add_fit(folder, fit_store(StoredImages(folder), sample=40, top_k=9))
        monkeypatch.setattr(Neurons, "scores", scores)
        return scores(self, *args)

    monkeypatch.setattr(Neurons, "scores", refitted)
    assert store.significant(0).num_rows == whole.num_rows == 6 * 256


def test_a_plan_that_does_not_fit_the_disk_is_refused_unless_forced(
    ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.planning.shutil.disk_usage", lambda _: type("Usage", (), {"free": 100_000})())
    recipe = capturing("neurons:all")
    with pytest.raises(PlanError, match=r"this takes 0\.\d GB before compression, and 0\.0 GB are free .* add --force"):
        ingest(recipe=recipe)
    assert not ingest.request.store.exists()
    assert ingest(recipe=recipe, force=True).stored == 40


def test_neurons_past_float16_are_an_error_that_names_them(ingest: Ingest, monkeypatch: pytest.MonkeyPatch) -> None:
    from schemas.errors import PrecisionError  # noqa: PLC0415

    encode = VitDecomposition.encode

    def loud(self: VitDecomposition, images: object) -> dict[str, object]:
        found = encode(self, images)
        return {name: values * (1e6 if name == "neurons_2" else 1) for name, values in found.items()}

    monkeypatch.setattr(VitDecomposition, "encode", loud)
    with pytest.raises(PrecisionError, match=r"neurons_2 reach .*, which overflows float16: use another store with"):
        ingest(recipe=capturing("neurons:2", dtype="float16"))


def silenced(folder: Path, change: str) -> str:
    """The golden transformer with five neurons of its second block that write nothing, or never fire."""
    shutil.copytree(GOLDEN / "vit", folder)
    weights = load_file(folder / "model.safetensors")
    name = "visual.transformer.resblocks.1.mlp."
    if change == "mute":
        weights[f"{name}c_proj.weight"][:, :5] = 0
    else:
        weights[f"{name}c_fc.weight"][:5] = 0
        weights[f"{name}c_fc.bias"][:5] = 0
    save_file(weights, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("change", ["mute", "dead"])
def test_neurons_that_do_nothing_are_significant_nowhere(ingest: Ingest, tmp_path: Path, change: str) -> None:
    model = silenced(tmp_path / "model", change)
    ingest(model=model, recipe=capturing("neurons:1", dtype="float16"))
    folder = StoreFolder.open(ingest.request.store)
    add_fit(folder, fit_store(StoredImages(folder), sample=40, top_k=6))
    store = open_store(folder.path)
    assert store.significant(1, slice(0, 5)).num_rows == 0
    assert 251 * 6 <= store.significant(1, slice(5, None)).num_rows <= 251 * 6 * 1.02
    assert (store.directions(1, neuron=slice(0, 5)) == 0).all()
    assert (store.neurons(1, slice(0, 5), what="norms") == 0).all()
    rounded, recipe = tmp_path / "rounded", capturing("neurons:1", dtype="float16", level="scores")
    ingest(store=rounded, model=model, recipe=recipe, fit=folder.path)
    assert open_store(rounded).significant(1, slice(0, 5)).num_rows == 0
    kept = tmp_path / "kept"
    ingest(
        store=kept, model=model, recipe=capturing("neurons:1", dtype="float16", level="significant"), fit=folder.path
    )
    assert open_store(kept).significant(1, slice(0, 5)).num_rows == 0
    rows = open_store(kept).significant(1).num_rows
    assert 251 * 6 <= rows <= 251 * 6 * 1.02, "coefficients were rounded, scores were not: none is lost for it"
    recorded = sum(pq.read_table(file).num_rows for file in (kept / "significant/default").iterdir())
    assert rows == recorded


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda s: s.neurons(), SelectionError, "holds neurons of layers 0, 2: name one"),
        (lambda s: s.neurons(1), ComponentError, "holds no neurons of layer 1; it holds those of 0, 2"),
        (lambda s: s.neurons([0, 2]), SelectionError, r"\[0, 2\] is no layer: give one number of 0, 2"),
        (lambda s: s.significant(2.0), SelectionError, "2.0 is no layer"),
        (lambda s: s.neurons(True), SelectionError, "True is no layer"),
        (lambda s: s.fit(""), SelectionError, "has no fit"),
        (lambda s: s.neurons(0, 256), SelectionError, "there is no neuron 256"),
        (lambda s: s.neurons(0, what="weights"), SelectionError, "'weights' is nothing to ask of a neuron"),
        (lambda s: s.neurons(0, effect="third"), SelectionError, "'third' is no effect"),
        (lambda s: s.neurons(0, effect="direct"), ComponentError, "no direct effects of layer 0"),
        (lambda s: s.neurons(1, effect="direct", what="norms"), ComponentError, "second-order"),
        (lambda s: s.pairs(), ComponentError, "is of a transformer, which has no pairs"),
        (lambda s: s.directions(0, head=1), ComponentError, "has no pairs"),
        (lambda s: s.neurons(0, view="other"), SelectionError, "is no view"),
    ],
)
def test_what_is_not_there_is_named(
    levels: dict[str, Store], ask: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ask(levels["coefficients"])


def test_a_resnet_has_no_heads_or_mlps(golden_resnet_store: Path) -> None:
    store = open_store(golden_resnet_store)
    with pytest.raises(ComponentError, match="is of a ResNet: it holds pairs"):
        store.heads()
    with pytest.raises(ComponentError, match="captured pairs, not direct"):
        store.neurons(neuron=3, effect="direct")


def test_every_damaged_fit_is_named_with_the_way_out(levels: dict[str, Store], tmp_path: Path) -> None:
    folder = StoreFolder.open(shutil.copytree(levels["coefficients"].folder.path, tmp_path / "copy"))
    add_fit(folder, fit_store(StoredImages(folder), sample=40, top_k=9))
    for name in folder.fit_names():
        chunk = folder.path / "fits" / name / "means_2" / "c" / "0" / "0"
        data = bytearray(chunk.read_bytes())
        data[len(data) // 2] ^= 1
        chunk.write_bytes(data)
    problems = verify_checksums(folder).problems
    assert len(problems) == 2
    assert all(problem.endswith(" and fit again") and "b'" not in problem for problem in problems)


def test_norms_without_a_fit_name_the_way_out(ingest: Ingest) -> None:
    ingest(recipe=capturing("neurons:1"))
    with pytest.raises(SelectionError, match="has no fit: make one with 'spectrograph fit'"):
        open_store(ingest.request.store).neurons(what="norms")
