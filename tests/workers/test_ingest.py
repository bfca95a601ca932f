"""The main job: exact, whole, resumable, and equal to an undisturbed run whatever happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
import xarray
from PIL import Image
from safetensors.torch import load_file, save_file

from schemas.errors import (
    BusyStoreError,
    DamagedStoreError,
    PlanError,
    PrecisionError,
    SourceError,
    StoreMismatchError,
)
from schemas.recipe import Recipe
from schemas.store import StoreFolder
from services.store import open_store
from services.verify import verify_sample
from tests.conftest import GOLDEN, Ingest, Recorder
from workers.decoding import as_shown
from workers.ingest import Outcome, run_ingest
from workers.planning import plan_ingest
from workers.shards import drop_batch
from workers.sources.folders import list_folder
from workers.staging import staging


def contents(store: Path) -> dict[str, bytes]:
    """Every published file of a store, but those that hold the time of creation."""
    files = (file for file in store.rglob("*") if file.is_file() and ".staging" not in file.parts)
    return {str(file.relative_to(store)): file.read_bytes() for file in files if file.name != "zarr.json"}


def assert_same(one: Path, two: Path) -> None:
    left, right = contents(one), contents(two)
    assert left.keys() == right.keys()
    assert [name for name in left if left[name] != right[name]] == []


def test_every_image_is_stored_once_with_its_facts(ingest: Ingest, scenes: Path) -> None:
    assert ingest() == Outcome(40, 40, 0, pytest.approx(40 * 2000, rel=0.9))
    table = open_store(ingest.request.store).images()
    names = sorted(str(file.relative_to(scenes)) for file in scenes.rglob("*.png"))
    assert table["image_id"].to_pylist() == [f"default/{name}" for name in names]
    assert table["label"].to_pylist() == [name.split("/")[0] for name in names]
    assert set(table["width"].to_pylist()) == {64}


def test_stored_numbers_are_those_of_the_stock_model(ingest: Ingest) -> None:
    ingest()
    store = open_store(ingest.request.store)
    model = open_clip.create_model(f"local-dir:{GOLDEN / 'vit'}").eval()
    preprocess = plan_ingest(ingest.request).loaded.preprocess
    sources = store.images()["source"].to_pylist()
    with torch.no_grad():
        truth = model.encode_image(torch.stack([preprocess(as_shown(Path(file))) for file in sources])).numpy()
    norms = np.linalg.norm(truth, axis=1)
    total = store.heads().sum(axis=(1, 2)) + store.mlps().sum(axis=1) + store.embedding() + store.constant()
    assert (np.linalg.norm(store.representation() - truth, axis=1) / norms).max() < 1e-5
    assert (np.linalg.norm(total - truth, axis=1) / norms).max() < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 1e-3), ("float32", 1e-6)])
def test_rebuilt_contributions_are_as_near_as_their_type_allows(ingest: Ingest, dtype: str, bound: float) -> None:
    recipe = replace(ingest.request.recipe, dtype=dtype)
    ingest(recipe=recipe)
    plan = plan_ingest(replace(ingest.request, recipe=recipe))
    listing = list_folder(ingest.request.source)
    images = torch.stack([plan.loaded.preprocess(as_shown(Path(listing.place(i).source))) for i in range(8)])
    found = plan.decomposition.encode(images)["heads"].double().numpy()
    truth = np.einsum("nlhr,lhrd->nlhd", found, plan.decomposition.basis["heads"].astype(float))
    rebuilt = open_store(ingest.request.store).heads()[:8]
    away = np.linalg.norm(rebuilt - truth, axis=-1) / np.linalg.norm(truth, axis=-1)
    assert away.max() < bound


def test_run_again_it_does_nothing(ingest: Ingest) -> None:
    ingest()
    before = contents(ingest.request.store)
    assert ingest() == Outcome(40, 40, 0, 0)
    assert contents(ingest.request.store) == before


def test_a_run_with_lost_shards_is_completed_to_the_same_bytes(ingest: Ingest, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    ingest(store=whole)
    ingest()
    store = ingest.request.store
    (store / "images" / "default" / "000001.parquet").unlink()
    shutil.rmtree(store / "batches" / "default" / "heads" / "c" / "2")
    (store / "images" / "default" / "000002.parquet").unlink()
    recorder = Recorder()
    run_ingest(plan_ingest(ingest.request), recorder)
    assert (recorder.images, len(recorder.shards)) == (24, 2)
    assert_same(store, whole)


COMMAND = [sys.executable, "-m", "services.cli", "ingest"]


def arguments(request_store: Path, scenes: Path) -> list[str]:
    model = ["--model", str(GOLDEN / "vit"), "--dtype", "float32", "--shard-images", "8", "--batch-size", "8"]
    return [str(scenes), str(request_store), *model, "--device", "cpu"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_run_that_is_stopped_is_completed_to_the_same_bytes(
    ingest: Ingest, scenes: Path, tmp_path: Path, signum: int, code: int
) -> None:
    store, whole = tmp_path / "stopped", tmp_path / "whole"
    ingest(store=whole, shard_images=8)
    slow = dict(os.environ, OMP_NUM_THREADS="1")
    running = subprocess.Popen([*COMMAND, *arguments(store, scenes)], env=slow, stderr=subprocess.PIPE, text=True)
    records = store / "images" / "default"
    while running.poll() is None and not (records.is_dir() and any(records.iterdir())):
        time.sleep(0.001)
    running.send_signal(signum)
    _, errors = running.communicate(timeout=60)
    if running.returncode != 0:  # it may have ended before the signal came
        assert running.returncode == code
        assert signum == signal.SIGKILL or errors == (
            "error: interrupted; what was recorded is safe: run the same command again\n"
        )
    ingest(store=store, shard_images=8)
    assert_same(store, whole)


def test_failed_images_are_recorded_and_the_others_stored(ingest: Ingest, scenes: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(scenes, source)
    (source / "star" / "empty.png").write_bytes(b"")
    (source / "a note.txt").write_text("no image")
    picture = next(scenes.rglob("*.png")).read_bytes()
    (source / "zz cut.png").write_bytes(picture[:200])
    assert replace(ingest(source=source), written_bytes=0) == Outcome(43, 40, 3, 0)
    store = open_store(ingest.request.store)
    reasons = {row["image_id"]: row["error"] for row in store.failures().to_pylist()}
    assert set(reasons) == {"default/a note.txt", "default/star/empty.png", "default/zz cut.png"}
    assert all(reasons.values())
    assert len(store.heads(layer=0, head=0)) == 40
    assert np.isfinite(store.heads()).all()


def test_a_folder_of_failures_alone_is_recorded(ingest: Ingest, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_text("x")
    assert ingest(source=source).failed == 1
    assert open_store(ingest.request.store).heads().shape == (0, 4, 4, 32)


def test_images_that_the_model_turns_into_no_numbers_are_failures(ingest: Ingest) -> None:
    plan = plan_ingest(ingest.request)
    stock = plan.decomposition.vision.conv1.forward

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        output = stock(x)
        output[0] = float("nan")
        return output

    plan.decomposition.vision.conv1.forward = poisoned
    outcome = run_ingest(plan, Recorder())
    assert (outcome.stored, outcome.failed) == (35, 5)
    reasons = open_store(ingest.request.store).failures()["error"].to_pylist()
    assert set(reasons) == {"the model's output is not finite"}


def test_extra_columns_are_kept_with_their_types(ingest: Ingest, scenes: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(scenes, source)
    names = sorted(str(file.relative_to(source)) for file in source.rglob("*.png"))
    (source / "metadata.csv").write_text("file_name,year,site\n" + "".join(f"{n},{i},x\n" for i, n in enumerate(names)))
    ingest(source=source)
    table = open_store(ingest.request.store).images()
    assert table["year"].to_pylist() == list(range(40))
    assert table.schema.field("year").type == pa.int64()


def test_two_batches_live_in_one_store(ingest: Ingest, scenes: Path) -> None:
    ingest()
    ingest(batch="monday", source=scenes / "star")
    store = open_store(ingest.request.store)
    assert store.batches() == ["default", "monday"]
    stars = sum(1 for _ in (scenes / "star").iterdir())
    assert store.images().num_rows == 40 + stars
    ids = [name for name in store.images()["image_id"].to_pylist() if name.startswith("monday/")]
    again = [name.replace("monday/", "default/star/") for name in ids]
    np.testing.assert_allclose(store.heads(images=ids), store.heads(images=again), atol=1e-5)


def scaled(folder: Path, factor: float) -> str:
    """The golden model with a louder or fainter output."""
    shutil.copytree(GOLDEN / "vit", folder)
    weights = load_file(folder / "model.safetensors")
    weights["visual.proj"] *= factor
    save_file(weights, folder / "model.safetensors")
    return str(folder)


def altered(folder: Path) -> str:
    """The golden model with one other weight."""
    shutil.copytree(GOLDEN / "vit", folder)
    weights = load_file(folder / "model.safetensors")
    weights["visual.proj"][0, 0] += 1
    save_file(weights, folder / "model.safetensors")
    return str(folder)


def test_another_model_or_recipe_is_refused_with_what_differs(ingest: Ingest, tmp_path: Path) -> None:
    ingest()
    with pytest.raises(StoreMismatchError, match="model weights"):
        ingest(model=altered(tmp_path / "other"))
    with pytest.raises(StoreMismatchError, match="dtype float32 in the store, float16 asked for"):
        ingest(recipe=replace(ingest.request.recipe, dtype="float16"))
    with pytest.raises(StoreMismatchError, match="capture heads,mlps in the store, heads asked for"):
        ingest(recipe=Recipe.of(["heads"], dtype="float32", precision="fp32"))
    with pytest.raises(StoreMismatchError, match="leave out --shard-images"):
        ingest(shard_images=7)


def test_a_changed_source_is_refused(ingest: Ingest, scenes: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(scenes, source)
    ingest(source=source)
    Image.new("RGB", (8, 8)).save(source / "one more.png")
    with pytest.raises(StoreMismatchError, match="was begun with 40 images"):
        ingest(source=source)


def test_plans_that_cannot_end_well_are_refused(ingest: Ingest, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="lies inside the source"):
        ingest(source=tmp_path)
    with pytest.raises(PlanError, match="at least 1"):
        ingest(batch_size=0)
    with pytest.raises(PlanError, match="is not supported: choose auto"):
        ingest(device="no-such-device")
    with pytest.raises(SourceError, match="does not exist"):
        ingest(source=tmp_path / "nowhere")
    with pytest.raises(PlanError, match="cannot capture heads of a ResNet: capture pairs"):
        ingest(model=str(GOLDEN / "resnet"))
    assert not ingest.request.store.exists()


def test_numbers_past_float16_are_an_error_that_names_the_way_out(ingest: Ingest, tmp_path: Path) -> None:
    folder = scaled(tmp_path / "loud", 1e6)
    with pytest.raises(PrecisionError, match="overflows float16: use another store with --dtype float32"):
        ingest(model=folder, recipe=replace(ingest.request.recipe, dtype="float16"))
    assert StoreFolder.open(ingest.request.store).shards("default") == []


def test_an_interrupted_creation_is_no_store_and_is_made_afresh(ingest: Ingest) -> None:
    store = ingest.request.store
    ingest()
    (store / "zarr.json").unlink()
    shutil.rmtree(store / "images")
    shutil.rmtree(store / "batches" / "default")
    ingest()
    assert open_store(store).images().num_rows == 40


def test_a_store_that_lost_its_description_is_not_taken_for_an_interrupted_creation(ingest: Ingest) -> None:
    ingest()
    (ingest.request.store / "zarr.json").unlink()
    before = contents(ingest.request.store)
    with pytest.raises(DamagedStoreError, match=r"has lost its zarr\.json"):
        ingest()
    assert contents(ingest.request.store) == before


def test_records_left_of_a_removed_batch_do_not_speak_for_the_next(ingest: Ingest, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    ingest(store=whole)
    ingest()
    shutil.rmtree(ingest.request.store / "batches" / "default")
    ingest()
    assert_same(ingest.request.store, whole)


@pytest.mark.parametrize("harm", ["missing", "flipped bit"])
def test_a_damaged_basis_is_an_error_for_writers_and_readers(ingest: Ingest, harm: str) -> None:
    ingest()
    file = ingest.request.store / "basis" / "heads" / "c" / "0" / "0" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[99] ^= 1
    file.unlink() if harm == "missing" else file.write_bytes(data)
    with pytest.raises(DamagedStoreError, match="basis/heads is damaged"):
        ingest(batch="second")
    with pytest.raises(DamagedStoreError, match="basis/heads is damaged"):
        open_store(ingest.request.store).heads()


def test_another_folder_with_the_same_names_is_not_taken_for_the_first(
    ingest: Ingest, scenes: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(scenes, copy)
    ingest()
    with pytest.raises(StoreMismatchError, match="was begun from"):
        ingest(source=copy)


def test_columns_that_clash_between_batches_are_refused_before_anything_is_written(
    ingest: Ingest, scenes: Path, tmp_path: Path
) -> None:
    name = next(scenes.rglob("*.png")).relative_to(scenes)
    for source, year in (("one", "1999"), ("two", "long ago")):
        shutil.copytree(scenes, tmp_path / source)
        (tmp_path / source / "metadata.csv").write_text(f",file_name,year,shard\n0,{name},{year},3\n")
    ingest(source=tmp_path / "one")
    with pytest.raises(SourceError, match="does not go with that of batch 'default'"):
        ingest(source=tmp_path / "two", batch="two")
    table = open_store(ingest.request.store).images()
    assert [row for row in table["shard"].to_pylist() if row is not None] == [3], "a source's column may have any name"


def test_a_finished_batch_needs_no_right_to_write(ingest: Ingest) -> None:
    ingest()
    shutil.rmtree(ingest.request.store / ".staging")
    before = sorted(ingest.request.store.rglob("*"))
    assert ingest() == Outcome(40, 40, 0, 0)
    assert sorted(ingest.request.store.rglob("*")) == before


def test_numbers_too_small_for_float16_are_an_error(ingest: Ingest, tmp_path: Path) -> None:
    with pytest.raises(PrecisionError, match="too small for float16: use another store with --dtype float32"):
        ingest(model=scaled(tmp_path / "faint", 1e-6), recipe=replace(ingest.request.recipe, dtype="float16"))
    assert ingest(model=str(tmp_path / "faint"), store=tmp_path / "exact").stored == 40


def test_names_that_look_alike_stay_apart(ingest: Ingest, scenes: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    picture = next(scenes.rglob("*.png")).read_bytes()
    for name in (b"\xff.png", b"\\xff.png", b"\\\\.png"):
        (source / os.fsdecode(name)).write_bytes(picture)
    ingest(source=source)
    store = open_store(ingest.request.store)
    assert len(set(store.images()["image_id"].to_pylist())) == 3
    assert verify_sample(store, 3, "cpu").images == 3, "every source can be found again"


def test_forty_kills_at_random_moments_lose_nothing(ingest: Ingest, scenes: Path, tmp_path: Path) -> None:
    """The process is killed while it makes the store, the batch, a shard, a record; the last run completes it."""
    whole, store = tmp_path / "whole", tmp_path / "killed"
    ingest(store=whole, shard_images=4)
    script = Path(__file__).with_name("kill_points.py")
    found = subprocess.run(
        [sys.executable, str(script), str(scenes), str(store), str(GOLDEN / "vit"), "40"],
        check=True,
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(GOLDEN.parent.parent)),
    )
    killed, ended = map(int, found.stdout.split())
    assert killed + ended == 40
    assert killed >= 20, "most runs are meant to be killed"
    ingest(store=store, shard_images=4)
    assert_same(store, whole)
    left = [entry for entry in (store / ".staging" / "default").rglob("*") if entry.name != "lock"]
    assert left == [], "what the killed left behind is removed"


def test_a_folder_with_other_things_is_not_written_into(ingest: Ingest) -> None:
    ingest.request.store.mkdir()
    (ingest.request.store / "thesis.txt").write_text("years of work")
    with pytest.raises(OSError, match="so it is no store"):
        ingest()
    assert [file.name for file in ingest.request.store.iterdir()] == ["thesis.txt"]


def test_batches_open_in_xarray(full_store: Path) -> None:
    batch = xarray.open_zarr(full_store / "batches" / "default", chunks=None)
    assert batch["heads"].dims == ("image", "layer", "head", "coefficient")
    assert batch.sizes["image"] == 40
    basis = xarray.open_zarr(full_store / "basis", chunks=None)
    heads = (batch["heads"] * basis["heads"]).sum("coefficient").transpose("image", "layer", "head", "dim")
    np.testing.assert_allclose(heads.values, open_store(full_store).heads(), atol=1e-5)


def test_a_store_is_readable_without_this_code(full_store: Path) -> None:
    root = json.loads((full_store / "zarr.json").read_text())["attributes"]["spectrograph"]
    assert root["recipe"]["capture"] == ["heads", "mlps", "cls_to_cls", "tokens"]
    assert root["model"]["config"]["embed_dim"] == 32


@pytest.mark.parametrize("begun", ["nothing", "store", "batch"])
def test_a_plan_that_another_process_overtook_is_refused_and_harms_nothing(ingest: Ingest, begun: str) -> None:
    if begun != "nothing":
        ingest(batch="other" if begun == "store" else "default")
    if begun == "batch":
        (ingest.request.store / "images" / "default" / "000001.parquet").unlink()
    slow = plan_ingest(ingest.request)
    ingest()
    before = contents(ingest.request.store)
    with pytest.raises(BusyStoreError, match="meanwhile: run"):
        run_ingest(slow, Recorder())
    assert contents(ingest.request.store) == before
    assert ingest().stored == 40


def test_a_batch_that_is_being_written_is_refused(ingest: Ingest) -> None:
    ingest(batch="other")
    plan = plan_ingest(ingest.request)
    with staging(ingest.request.store, "default"), pytest.raises(BusyStoreError, match="wait until it ends"):
        in_thread(lambda: run_ingest(plan, Recorder()))
    assert run_ingest(plan, Recorder()).stored == 40


def in_thread(call: Callable[[], object]) -> None:
    """Runs a call in another thread: a lock's owner is let in again."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()


@pytest.mark.parametrize("stop", [1, 2])
def test_a_removal_that_was_stopped_leaves_no_half_of_a_batch(
    ingest: Ingest, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    ingest()
    folder = StoreFolder.open(ingest.request.store)
    calls = []

    def stopped(*_: object, **__: object) -> None:
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr("workers.shards.shutil.rmtree", stopped)
    with pytest.raises(KeyboardInterrupt):
        drop_batch(folder, "default")
    monkeypatch.undo()
    assert open_store(folder.path).images().num_rows == 0
    if stop == 1:
        drop_batch(folder, "default")
    assert folder.batch_names() == []
    assert ingest().stored == 40
