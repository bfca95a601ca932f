import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from schemas.errors import DamagedStoreError, NotAStoreError, SelectionError
from schemas.layout import record_path
from schemas.store import StoreFolder


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, NotAStoreError, "is empty"),
        ("{", DamagedStoreError, "not JSON"),
        ("{}", NotAStoreError, "no Spectrograph store"),
        (json.dumps({"attributes": {"spectrograph": {"format": 99}}}), NotAStoreError, "format 99"),
        (json.dumps({"attributes": {"spectrograph": {"format": 2}}}), DamagedStoreError, "model"),
        (json.dumps({"attributes": {"spectrograph": [1]}}), DamagedStoreError, "does not describe"),
        (json.dumps({"attributes": 3}), NotAStoreError, "no Spectrograph store"),
        ("[]", DamagedStoreError, "not JSON"),
    ],
)
def test_what_is_no_store_is_told_from_what_is_a_damaged_one(
    tmp_path: Path, content: str | None, error: type[Exception], message: str
) -> None:
    if content is not None:
        (tmp_path / "zarr.json").write_text(content)
    with pytest.raises(error, match=message):
        StoreFolder.open(tmp_path)


def test_a_missing_folder_and_a_file_are_no_stores(tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError, match="does not exist"):
        StoreFolder.open(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotAStoreError, match="a store is a folder"):
        StoreFolder.open(tmp_path / "file")


def test_an_unknown_batch_names_those_there_are(full_store: Path) -> None:
    with pytest.raises(SelectionError, match="it has default"):
        StoreFolder.open(full_store).batch("tuesday")


def test_records_keep_digests_of_every_object(full_store: Path) -> None:
    folder = StoreFolder.open(full_store)
    for shard in folder.shards("default"):
        digests = folder.digests("default", shard)
        assert set(digests) == set(folder.specs)
        for name, digest in digests.items():
            assert folder.shard_path("default", folder.specs[name], shard).stat().st_size == digest.bytes


def test_the_manifest_says_how_the_store_was_made(full_store: Path) -> None:
    manifest = StoreFolder.open(full_store).manifest
    assert len(manifest.model.fingerprint) == 64
    assert manifest.model.config["vision_cfg"]["layers"] == 4
    assert manifest.model.preprocessing["interpolation"] == "bicubic"
    assert {"torch", "zarr", "spectrograph"} <= set(manifest.libraries)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "layers"), None),
        (("model", "dim"), 0),
        (("model", "config"), "x"),
        (("recipe", "capture"), ["souls"]),
        (("recipe", "dtype"), 3),
        (("libraries",), None),
    ],
)
def test_a_description_that_makes_no_sense_is_damage(
    full_store: Path, tmp_path: Path, path: tuple[str, ...], value: object
) -> None:
    described = json.loads((full_store / "zarr.json").read_text())
    place = described["attributes"]["spectrograph"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "zarr.json").write_text(json.dumps(described))
    with pytest.raises(DamagedStoreError, match="does not describe the store"):
        StoreFolder.open(tmp_path)


def test_flipped_bits_in_a_record_never_pass_for_other_values(full_store: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(full_store, store)
    folder = StoreFolder.open(store)
    truth = folder.record("default", 1)
    file = store / record_path("default", 1)
    stock = file.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.integers(0, len(stock), 200):
        data = bytearray(stock)
        data[place] ^= 1 << int(rng.integers(0, 8))
        file.write_bytes(data)
        try:
            assert folder.record("default", 1).to_pylist() == truth.to_pylist()
        except DamagedStoreError:
            refused += 1
    assert refused > 50


def test_strange_files_among_the_records_are_passed_over(full_store: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(full_store, store)
    (store / "images" / "default" / "notes.parquet").write_text("mine")
    assert StoreFolder.open(store).shards("default") == [0, 1, 2]


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("model", {"family": "foo"}),
        ("model", {"layers": True}),
        ("recipe", {"capture": ["neurons:all"]}),
        ("recipe", {"capture": ["neurons:0-40"]}),
        ("recipe", {"level": []}),
        ("recipe", {"fit": 5}),
        ("recipe", {"level": "scores", "capture": ["neurons:0"]}),
    ],
)
def test_descriptions_of_no_sense_are_damage(full_store: Path, tmp_path: Path, part: str, change: object) -> None:
    described = json.loads((full_store / "zarr.json").read_text())
    described["attributes"]["spectrograph"][part] |= change
    (tmp_path / "zarr.json").write_text(json.dumps(described))
    with pytest.raises(DamagedStoreError, match="does not describe the store"):
        StoreFolder.open(tmp_path)
