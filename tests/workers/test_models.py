import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from schemas.errors import ModelError
from tests.conftest import GOLDEN
from workers.models import fingerprint, load_model


def test_a_folder_loads_with_its_own_preprocessing() -> None:
    loaded = load_model(str(GOLDEN / "vit"))
    assert loaded.config["vision_cfg"]["layers"] == 4
    assert loaded.preprocessing["size"] == (32, 32) or loaded.preprocessing["size"] == 32
    assert not loaded.clip.training


def test_the_fingerprint_tells_weights_apart() -> None:
    one, two = (open_clip.create_model(f"local-dir:{GOLDEN / 'vit'}") for _ in range(2))
    assert fingerprint(one) == fingerprint(two)
    with torch.no_grad():
        two.visual.proj[0, 0] += 1e-6
    assert fingerprint(one) != fingerprint(two)


def test_texts_become_unit_vectors() -> None:
    vectors = load_model("toy-resnet").encode_texts(["a star", "a red ring"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-23", None, "did you mean ViT-B-32"),
        ("toy-vits", None, "toy-vit"),
        ("ViT-B-32", None, "add --pretrained"),
        ("ViT-B-32", "laion3b", "no weights 'laion3b'"),
        ("ViT-B-32", "openai", "use ViT-B-32-quickgelu"),
        (str(GOLDEN), None, "holds no open_clip_config.json"),
        (str(GOLDEN / "vit"), "openai", "leave out --pretrained"),
    ],
)
def test_models_that_are_not_there_are_refused_with_a_way_out(name: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(name, pretrained)


class Harm:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.file),))


def test_weights_that_carry_code_do_not_run_it(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "vit" / "open_clip_config.json", tmp_path)
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(Harm(tmp_path / "harmed"), protocol=2))
    with pytest.raises(ModelError, match="cannot load the model"):
        load_model(str(tmp_path))
    assert not (tmp_path / "harmed").exists()


def test_a_folder_is_remembered_by_its_whole_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    assert load_model("./vit/").name == str(GOLDEN / "vit")


@pytest.mark.parametrize(
    "damage", ["no weights", "empty pickle", "cut short", "other shapes", "no config", "bad pooling"]
)
def test_folders_with_unusable_weights_are_refused(tmp_path: Path, damage: str) -> None:
    config = json.loads((GOLDEN / "vit" / "open_clip_config.json").read_text())
    weights = (GOLDEN / "vit" / "model.safetensors").read_bytes()
    if damage == "other shapes":
        config["model_cfg"]["vision_cfg"]["width"] = 32
    if damage == "bad pooling":
        config["model_cfg"]["vision_cfg"]["pool_type"] = "deep"
    text = "{" if damage == "no config" else json.dumps(config)
    (tmp_path / "open_clip_config.json").write_text(text)
    if damage == "empty pickle":
        (tmp_path / "open_clip_pytorch_model.bin").touch()
    elif damage != "no weights":
        (tmp_path / "model.safetensors").write_bytes(weights[:5000] if damage == "cut short" else weights)
    with pytest.raises(ModelError, match="cannot load the model"):
        load_model(str(tmp_path))
