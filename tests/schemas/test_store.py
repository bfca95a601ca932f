import json
from pathlib import Path

import pytest

from schemas.errors import DamagedStoreError, NotAStoreError, SelectionError
from schemas.store import StoreFolder


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, NotAStoreError, "is empty"),
        ("{", DamagedStoreError, "not JSON"),
        ("{}", NotAStoreError, "no Spectrograph store"),
        (json.dumps({"attributes": {"spectrograph": {"format": 99}}}), NotAStoreError, "format 99"),
        (json.dumps({"attributes": {"spectrograph": {"format": 1}}}), DamagedStoreError, "model"),
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
