"""The command line as a user meets it: what it prints, how it ends, and no traceback for a mistake."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from services import cli
from services.store import open_store
from tests.conftest import GOLDEN

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["spectrograph", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        found = capsys.readouterr()
        return code, found.out, found.err

    return call


VIT = ("--model", GOLDEN / "vit", "--device", "cpu")


def test_help_names_every_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert [name for name in ("demo", "drop", "fit", "info", "ingest", "verify") if f"\n  {name} " not in out] == []


def test_ingest_plans_reconciles_and_does_nothing_twice(run: Run, scenes: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    code, out, err = run("ingest", scenes, store, *VIT, "--shard-images", 16)
    assert (code, err) == (0, "")
    assert f"source   {scenes}: 40 images\n" in out
    assert "batch default: 3 shards of up to 16 images, 0 recorded\n" in out
    assert "size     972 bytes per image, " in out
    assert "seen 40 = stored 40 + failed 0\n" in out
    code, out, _ = run("ingest", scenes, store, *VIT)
    assert code == 0
    assert "nothing to do: every shard is recorded\nseen 40 = stored 40 + failed 0\n" in out


def test_info_and_verify_tell_a_sound_store(run: Run, scenes: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run("ingest", scenes, store, *VIT)
    code, out, _ = run("info", store)
    assert code == 0
    assert "4 layers of 4 heads and an MLP of 256 neurons; 32 dimensions" in out
    assert "layer 4, head 4, coefficient 16 (float16)" in out
    code, out, _ = run("verify", store)
    assert code == 0
    assert "encoded 16 images anew\n" in out
    assert out.endswith("all is well\n")


def test_verify_of_a_damaged_store_names_the_file_and_fails(run: Run, scenes: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run("ingest", scenes, store, *VIT)
    (store / "batches/default/mlps/c/0/0/0").unlink()
    code, out, err = run("verify", store)
    assert code == 1
    assert "mlps/c/0/0/0 is missing\n1 problem\n" in out
    assert err.startswith("error: ")


def test_fit_says_what_it_learnt_and_scores_follow_from_it(run: Run, scenes: Path, tmp_path: Path) -> None:
    whole, scores = tmp_path / "whole", tmp_path / "scores"
    code, out, _ = run("ingest", scenes, whole, *VIT, "--capture", "neurons:all")
    assert code == 0
    assert "capture  neurons:0-2 as float16" in out
    assert "neurons  kept as coefficients; the choices, in bytes per image, all else included: coefficients" in out
    code, out, _ = run("fit", whole, "--top-k", 5)
    assert code == 0
    assert re.search(r"fit [0-9a-f]{12} of 40 images, the 5 largest of each neuron counted", out)
    code, out, _ = run(
        "ingest", scenes, scores, *VIT, "--capture", "neurons:1", "--neurons", "significant", "--fit", whole
    )
    assert code == 0
    code, out, _ = run("info", scores)
    assert re.search(r"neurons  kept as significant by the fit [0-9a-f]{12}: scores of the images over", out)
    assert re.search(r"fit [0-9a-f]{12} of 40 images", out)
    assert run("verify", scores)[0] == 0
    code, _, err = run("fit", scores)
    assert code == 1
    assert "fit a store that keeps coefficients" in err


def test_a_batch_is_dropped_and_the_others_stay(
    run: Run, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    for batch in ("one", "two"):
        run("ingest", scenes, store, *VIT, "--batch", batch)
    truth = open_store(store).heads(images=[name for name in ids(store) if name.startswith("two/")])
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    code, out, err = run("drop", store, "--batch", "one")
    assert (code, err) == (1, "error: nothing was removed\n")
    assert "Remove batch 'one' of 40 images" in out
    assert len(ids(store)) == 80
    code, out, _ = run("drop", store, "--batch", "one", "--yes")
    assert (code, out.startswith("removed batch 'one' of 40 images, ")) == (0, True)
    assert open_store(store).batches() == ["two"]
    np.testing.assert_array_equal(open_store(store).heads(), truth)
    assert run("verify", store)[0] == 0
    code, _, err = run("drop", store, "--batch", "one", "--yes")
    assert "has no batch 'one'; it has two" in err
    assert run("ingest", scenes, store, *VIT, "--batch", "one")[0] == 0
    assert len(ids(store)) == 80


def ids(store: Path) -> list[str]:
    return open_store(store).images()["image_id"].to_pylist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ingest", "nowhere", "STORE", *VIT), "nowhere does not exist"),
        (("ingest", "SCENES", "STORE", "--model", "ViT-B-23"), "did you mean ViT-B-32"),
        (
            ("ingest", "SCENES", "STORE", "--model", GOLDEN / "resnet"),
            "cannot capture heads of a ResNet: capture pairs",
        ),
        (("ingest", "SCENES", "STORE", *VIT, "--capture", "heads,souls"), "cannot capture souls"),
        (
            ("ingest", "SCENES", "STORE", *VIT, "--capture", "neurons:3"),
            "layers 0 to 2 of this model have",
        ),
        (("ingest", "SCENES", "STORE", *VIT, "--capture", "neurons:1,2"), "write neurons:1+2, not neurons:1,2"),
        (("ingest", "SCENES", "STORE", *VIT, "--capture", "pairs", "--neurons", "scores"), "leave out --neurons"),
        (("ingest", "SCENES", "STORE", *VIT, "--capture", "pairs"), "cannot capture pairs of a transformer"),
        (("ingest", "SCENES", "STORE", *VIT, "--capture", "neurons:1", "--neurons", "scores"), "only by a fit"),
        (("ingest", "SCENES", "STORE", *VIT, "--capture", "neurons:1", "--fit", "nowhere"), "leave out --fit"),
        (("ingest", "SCENES", "STORE", *VIT, "--batch", "a/b"), "cannot name a batch"),
        (("fit", "nowhere"), "does not exist, so it is no store"),
        (("ingest", "SCENES", "SCENES/inner", *VIT), "lies inside the source"),
        (("ingest", "SCENES", GOLDEN / "README.md", *VIT), "a store is a folder"),
        (("info", "nowhere"), "does not exist, so it is no store"),
        (("verify", "SCENES"), "holds no zarr.json"),
        (("demo", "SCENES"), "holds something else"),
        (("demo", "STORE", "--images", 5), "too few"),
    ],
)
def test_mistakes_are_one_sentence_and_no_traceback(
    run: Run, scenes: Path, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    places = {"SCENES": str(scenes), "STORE": str(tmp_path / "store"), "SCENES/inner": str(scenes / "inner")}
    code, _, err = run(*(places.get(str(argument), argument) for argument in arguments))
    assert code == 1
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "store").exists()


def test_a_wrong_option_is_a_usage_error(run: Run) -> None:
    code, _, err = run("ingest", "a", "b", "--model", "c", "--dtype", "float8")
    assert code == 2
    assert "'float16', 'float32'" in err


def test_failures_are_listed(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "in [here]"
    source.mkdir()
    for name in ("a.png", "b.png"):
        (source / name).write_text("x")
    code, out, _ = run("ingest", source, tmp_path / "store", *VIT)
    assert code == 0
    assert "seen 2 = stored 0 + failed 2" in out
    code, out, _ = run("info", tmp_path / "store", "--failures")
    assert f"{source / 'a.png'}: not an image\n" in out
    assert "2 x not an image\n2 failed\n" in out


def test_real_photographs_go_through(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "photographs"
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        (source / name).mkdir(parents=True)
        for index in range(6):
            crop = photograph[40 * index : 40 * index + 224, 60 * index : 60 * index + 224]
            Image.fromarray(crop).save(source / name / f"{index}.jpg", quality=92)
    code, out, _ = run("ingest", source, tmp_path / "store", *VIT)
    assert code == 0
    assert "seen 12 = stored 12 + failed 0" in out
    code, out, _ = run("verify", tmp_path / "store")
    assert code == 0
    heads = open_store(tmp_path / "store").heads(view="reference")
    between = np.linalg.norm(heads[:6].mean(axis=0) - heads[6:].mean(axis=0))
    assert between > np.linalg.norm(heads[:3].mean(axis=0) - heads[3:6].mean(axis=0)), "crops of one picture are alike"


def test_the_demo_says_what_it_found_and_draws_it(run: Run, tmp_path: Path) -> None:
    code, out, err = run("demo", tmp_path / "demo", "--images", 300)
    assert (code, err) == (0, "")
    assert "seen 300 = stored 300 + failed 0" in out
    assert "all is well" in out
    for attribute in ("shape", "colour", "background"):
        assert out.replace("\n ", "\n").count(f"\n{attribute} ") == 3
    assert "neuron:" in out
    assert "pair:" in out
    page = (tmp_path / "demo" / "index.html").read_text()
    sources = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert len(sources) == 3 * 5 * 9 + 2 * 3 * 3 * 6
    assert all((tmp_path / "demo" / source).is_file() for source in sources)
    code, out, _ = run("demo", tmp_path / "demo", "--images", 300)
    assert code == 0
    assert "nothing to do" in out
