"""The small world's truth is true, and its models know it."""

import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from services.roles import Task
from workers.models import TOYS, load_model
from workers.toyworld import train
from workers.toyworld.attributes import VALUES, Attributes, Cue, World, prompts
from workers.toyworld.scenes import SIDE, draw, scene

HELD_OUT = 9  # a seed that no model was trained or tuned on
attributes = st.builds(Attributes, **{name: st.sampled_from(values) for name, values in VALUES.items()})


@given(truth=attributes, seed=st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_masks_hold_exactly_the_objects(truth: Attributes, seed: int) -> None:
    drawn = draw(truth, np.random.default_rng(seed))
    assert drawn.picture.shape == (SIDE, SIDE, 3)
    assert len(drawn.masks) == ("one", "two", "three").index(truth.count) + 1
    assert drawn.masks.sum(axis=0).max() == 1, "objects do not overlap"
    areas = drawn.masks.sum(axis=(1, 2))
    assert areas.min() > 30, "every object can be seen whole"
    assert areas.max() < 1.35 * areas.min()
    # The colour inside the masks is one hue up to its texture's shade, and no pixel outside is drawn in it.
    inside = drawn.picture[drawn.masks.any(axis=0)].astype(float)
    whole = inside.max(axis=1) < 255  # a channel that would be brighter than white is cut
    inside = inside[whole] if whole.any() else inside
    brightest = inside[inside.sum(axis=1).argmax()]
    shades = inside @ brightest / (brightest @ brightest)
    assert np.abs(inside - shades[:, None] * brightest).max() < 3


def test_the_same_index_is_the_same_scene() -> None:
    one, two = (scene(World(), seed=3, index=5) for _ in range(2))
    assert one.attributes == two.attributes
    assert np.array_equal(one.picture, two.picture)
    assert not np.array_equal(one.picture, scene(World(), seed=3, index=6).picture)


def test_distributions_are_followed() -> None:
    world = World({"colour": {"red": 3, "blue": 1}, "count": {"two": 1}})
    drawn = [world.draw(np.random.default_rng((1, i))) for i in range(2000)]
    colours = Counter(truth.colour for truth in drawn)
    assert set(colours) == {"red", "blue"}
    assert colours["red"] / 2000 == pytest.approx(0.75, abs=0.03)
    assert {truth.count for truth in drawn} == {"two"}
    assert len({truth.shape for truth in drawn}) == 8, "what is not named stays uniform"


def test_cues_plant_correlations() -> None:
    world = World(cues=(Cue("shape", "star", "background", {"night": 0.9, "snow": 0.1}),))
    drawn = [world.draw(np.random.default_rng((2, i))) for i in range(4000)]
    stars = [truth.background for truth in drawn if truth.shape == "star"]
    others = [truth.background for truth in drawn if truth.shape != "star"]
    assert stars.count("night") / len(stars) == pytest.approx(0.9, abs=0.05)
    assert others.count("night") / len(others) == pytest.approx(1 / 8, abs=0.03)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: World({"colour": {"beige": 1}}),
        lambda: World({"smell": {"red": 1}}),
        lambda: World({"colour": {"red": -1, "blue": 2}}),
        lambda: World({"colour": {"red": 0}}),
        lambda: Cue("shape", "egg", "background", {"night": 1}),
        lambda: Cue("background", "night", "shape", {"star": 1}),
    ],
)
def test_worlds_that_make_no_sense_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"attribute|weights|value|cue"):
        wrong()


def test_captions_name_what_they_are_asked_to() -> None:
    truth = Attributes("cross", "orange", "striped", "small", "centre", "two", "snow")
    assert truth.caption() == "two small striped orange crosses on snow in the centre"
    assert truth.describe({"colour"}) == "an orange object"
    assert prompts("shape")["star"] == "a star"
    assert prompts("background")["night"] == "an object on night"
    assert prompts("count")["three"] == "three objects"


@pytest.mark.parametrize("name", sorted(TOYS))
def test_shipped_models_know_shape_colour_and_background(name: str) -> None:
    model = load_model(name)
    drawn = [scene(World(), seed=HELD_OUT, index=index) for index in range(600)]
    with torch.no_grad():
        pixels = torch.stack([model.preprocess(Image.fromarray(each.picture)) for each in drawn])
        found = model.clip.encode_image(pixels).numpy()
    for attribute, least in (("shape", 0.9), ("colour", 0.95), ("background", 0.9)):
        truth = np.array([VALUES[attribute].index(getattr(each.attributes, attribute)) for each in drawn])
        task = Task(attribute, model.encode_texts(list(prompts(attribute).values())), truth)
        assert task.accuracy(found) >= least
        assert task.chance < 0.2


def test_shipped_models_are_what_they_say_and_pack_small() -> None:
    vit = load_model("toy-vit").config["vision_cfg"]
    assert vit["layers"] >= 6
    assert vit["width"] // vit["head_width"] >= 4
    assert isinstance(load_model("toy-resnet").clip.visual, open_clip.modified_resnet.ModifiedResNet)
    packed = [
        len(zlib.compress(file.read_bytes())) for folder in TOYS.values() for file in folder.glob("*.safetensors")
    ]
    assert len(packed) == 2
    assert sum(packed) < 10e6
    assert all("as shipped" in (folder / "train.log").read_text() for folder in TOYS.values())


def test_the_training_script_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    sizes = {"--scenes": 40, "--steps": 4, "--easy-steps": 2, "--batch-size": 8, "--held-out": 20}
    arguments = [str(part) for pair in sizes.items() for part in pair]
    monkeypatch.setattr("sys.argv", ["train", "vit", str(tmp_path), *arguments])
    train.main()
    assert "as shipped, on 20 held-out scenes" in (tmp_path / "train.log").read_text()
    assert load_model(str(tmp_path)).config["embed_dim"] == 64
    for handler in list(train.log.handlers):
        train.log.removeHandler(handler)
        handler.close()
    capsys.readouterr()
