import shutil
from pathlib import Path

import numpy as np
import pytest

from schemas.errors import StoreMismatchError
from schemas.recipe import Recipe
from services.store import open_store
from services.verify import verify_checksums, verify_sample
from tests.conftest import GOLDEN, Ingest
from tests.workers.test_ingest import altered


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sound_store_has_no_problems(ingest: Ingest, dtype: str, precision: str) -> None:
    ingest(recipe=Recipe.of(["heads", "mlps"], dtype=dtype, precision=precision))
    store = open_store(ingest.request.store)
    sums = verify_checksums(store.folder)
    assert (sums.shards, sums.objects, sums.problems) == (3, 15, ())
    sample = verify_sample(store, 10, "cpu")
    assert (sample.images, sample.unavailable, sample.problems) == (10, 0, ())
    assert sample.total is not None


@pytest.mark.parametrize("place", ["batches/default/mlps/c/2/0/0", "batches/default/representation/c/0/0"])
def test_every_changed_object_is_found(ingest: Ingest, place: str) -> None:
    ingest()
    file = ingest.request.store / place
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    problems = verify_checksums(open_store(ingest.request.store).folder).problems
    assert len(problems) == 1
    assert place in problems[0]


def test_missing_objects_swapped_records_and_a_damaged_basis_are_found(ingest: Ingest) -> None:
    ingest()
    store = ingest.request.store
    (store / "batches/default/heads/c/0/0/0/0").unlink()
    shutil.copy(store / "images/default/000001.parquet", store / "images/default/000002.parquet")
    basis = store / "basis/heads/c/0/0/0/0"
    data = bytearray(basis.read_bytes())
    data[100] ^= 1
    basis.write_bytes(data)
    problems = "\n".join(verify_checksums(open_store(store).folder).problems)
    assert "heads/c/0/0/0/0 is missing" in problems
    assert "lists other rows" in problems
    assert f"{store / 'basis' / 'heads'} is damaged" in problems


def test_numbers_that_do_not_sum_are_found(ingest: Ingest, monkeypatch: pytest.MonkeyPatch) -> None:
    ingest()
    store = open_store(ingest.request.store)
    stock = store.mlps
    monkeypatch.setattr(store, "mlps", lambda images: stock(images=images) * 1.01)
    sample = verify_sample(store, 40, "cpu")
    assert len(sample.problems) == 40
    assert "contributions sum to" in sample.problems[0]


def test_files_that_are_gone_or_changed_are_counted(ingest: Ingest, scenes: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(scenes, source)
    ingest(source=source)
    files = sorted(source.rglob("*.png"))
    files[0].unlink()
    files[-1].write_bytes(b"other")
    sample = verify_sample(open_store(ingest.request.store), 40, "cpu")
    assert (sample.images, sample.unavailable) == (38, 2)


def test_another_model_under_the_same_name_is_refused(ingest: Ingest, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "vit", folder)
    ingest(model=str(folder))
    shutil.rmtree(folder)
    altered(folder)
    with pytest.raises(StoreMismatchError, match="other weights"):
        verify_sample(open_store(ingest.request.store), 4, "cpu")


def test_heads_alone_are_verified_by_their_output(ingest: Ingest) -> None:
    ingest(recipe=Recipe.of(["heads"], dtype="float32", precision="fp32"))
    sample = verify_sample(open_store(ingest.request.store), 4, "cpu")
    assert sample.total is None
    assert np.isfinite(sample.representation)
