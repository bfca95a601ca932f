"""What many tests share: golden data, a folder of scenes, and a finished store."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from schemas.recipe import Recipe
from workers.decoding import Decoded, FileFacts
from workers.ingest import Outcome, run_ingest
from workers.planning import plan_ingest
from workers.request import Request
from workers.sources.listing import Place
from workers.toyworld.attributes import World
from workers.toyworld.scenes import scene

GOLDEN = Path(__file__).parent / "golden"
torch.set_num_threads(1)  # small tensors: threads cost more than they give, and sums stay the same everywhere


@pytest.fixture(scope="session")
def golden_vit() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "vit" / "first_order.npz") as arrays:
        found = dict(arrays)
    assert len(found["images"]) == 64
    return found


@pytest.fixture(scope="session")
def golden_second_order() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "vit" / "second_order.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def golden_resnet() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "resnet" / "neuron_heads.npz") as arrays:
        found = dict(arrays)
    assert len(found["images"]) == 32
    return found


@pytest.fixture(scope="session")
def golden_vit_store(golden_vit: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that can be captured of the golden transformer's images; tests may add fits."""
    capture = ["heads", "mlps", "cls_to_cls", "tokens", "neurons:all", "direct:all"]
    return ingest_inputs(golden_vit["images"], tmp_path_factory.mktemp("golden-vit"), "vit", capture, 8)


@pytest.fixture(scope="session")
def golden_resnet_store(golden_resnet: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pairs of the golden ResNet's images; tests may add fits."""
    return ingest_inputs(golden_resnet["images"], tmp_path_factory.mktemp("golden-resnet"), "resnet", ["pairs"], 2)


def ingest_inputs(inputs: np.ndarray, folder: Path, model: str, capture: list[str], batch_size: int) -> Path:
    """A store of golden images, which exist as the model's inputs and not as files."""
    source = folder / "images"
    source.mkdir()
    for index in range(len(inputs)):
        (source / f"{index:02d}").write_text("an input of the golden data")

    def decoded(place: Place, _: object) -> Decoded:
        index = int(Path(place.source).name)
        return Decoded(FileFacts(f"{index:064x}", 1, "golden", 32, 32), torch.from_numpy(inputs[index]))

    recipe = Recipe.of(capture, dtype="float32", precision="fp32")
    request = Request(source, folder / "store", str(GOLDEN / model), None, "default", recipe, "cpu", batch_size, 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.ingest.decode_image", decoded)
        Ingest(request)()
    return folder / "store"


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 scenes, in a sub-folder for each shape."""
    folder = tmp_path_factory.mktemp("scenes")
    for index in range(40):
        drawn = scene(World(), seed=11, index=index)
        file = folder / drawn.attributes.shape / f"{index:03d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(drawn.picture).save(file)
    return folder


class Recorder:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.images = self.failed = 0
        self.shards: list[int] = []

    def encoded(self, images: int, failed: int) -> None:
        self.images += images
        self.failed += failed

    def wrote(self, size: int) -> None:
        self.shards.append(size)


@dataclass(frozen=True)
class Ingest:
    """Makes requests that differ from a small one in what a test is about."""

    request: Request

    def __call__(self, **changes: object) -> Outcome:
        return run_ingest(plan_ingest(replace(self.request, **changes)), Recorder())


@pytest.fixture
def ingest(scenes: Path, tmp_path: Path) -> Ingest:
    recipe = Recipe.of(["heads", "mlps"], dtype="float32", precision="fp32")
    store = tmp_path / "store"
    return Ingest(Request(scenes, store, str(GOLDEN / "vit"), None, "default", recipe, "cpu", 8, 16))


@pytest.fixture(scope="session")
def full_store(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of everything that can be captured; tests must not change it."""
    recipe = Recipe.of(["heads", "mlps", "cls_to_cls", "tokens"], dtype="float32", precision="fp32")
    store = tmp_path_factory.mktemp("full") / "store"
    Ingest(Request(scenes, store, str(GOLDEN / "vit"), None, "default", recipe, "cpu", 8, 16))()
    return store
