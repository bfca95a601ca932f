"""Loading CLIP models by name, and what tells two of them apart."""

import contextlib
import difflib
import hashlib
import json
import logging
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors import SafetensorError

from schemas.errors import ModelError
from workers.decoding import DECODING, Preprocess

TOYS: Final = {
    "toy-vit": Path(__file__).parent / "toyworld" / "vit",
    "toy-resnet": Path(__file__).parent / "toyworld" / "resnet",
}
_CONFIG: Final = "open_clip_config.json"
_FAILURES: Final = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AssertionError,
    AttributeError,
    ImportError,
    pickle.UnpicklingError,
    SafetensorError,
)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to encode, with its own preprocessing."""

    name: str
    pretrained: str | None
    clip: Any  # open_clip's CLIP, CustomTextCLIP or CoCa
    preprocess: Preprocess
    config: dict[str, Any]
    preprocessing: dict[str, Any]  # open_clip's settings, and what happens to a picture before them
    device: str
    fingerprint: str  # SHA-256 of all weights

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors of texts in the joint space. (N, D)"""
        tokens = open_clip.get_tokenizer(_reference(self.name, self.pretrained))(list(texts)).to(self.device)
        vectors: NDArray[np.float32] = self.clip.encode_text(tokens, normalize=True).float().cpu().numpy()
        return vectors


def load_model(name: str, pretrained: str | None = None, *, device: str = "cpu") -> LoadedModel:
    """The model called ``name``, with its trained weights, in float32.

    No code in a weights file is run: safetensors are preferred, and pickles are read for their tensors alone.

    Args:
        name: a name that open_clip knows, ``hf-hub:OWNER/REPO``, a folder with ``open_clip_config.json`` and weights,
            or one of the toy models.
        pretrained: for a name that open_clip knows, a tag of it or a file of weights.
        device: where the model goes.

    Raises:
        ModelError: there is no such model, or its weights cannot be had.
    """
    reference = _reference(name, pretrained)
    if name not in TOYS and Path(name).is_dir():
        name = str(Path(name).resolve())  # the store must find it from anywhere
    if pretrained is not None and Path(pretrained).is_file():
        pretrained = str(Path(pretrained).resolve())
    try:
        with _quiet():
            clip = open_clip.create_model(reference, pretrained, device=device, require_pretrained=True)
            config = open_clip.get_model_config(reference)
        settings = dict(clip.visual.preprocess_cfg)
        preprocess = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    except _FAILURES as error:
        raise ModelError(f"cannot load the model {name!r}: {_first_line(error)}") from error
    return LoadedModel(
        name,
        pretrained,
        clip.eval(),
        preprocess,
        dict(config or {}),
        {"decoding": DECODING, **settings},
        device,
        fingerprint(clip),
    )


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over the names, types, shapes and values of all weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        found.update(json.dumps([name, str(values.dtype), list(values.shape)]).encode())
        found.update(values.view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _reference(name: str, pretrained: str | None) -> str:
    """What open_clip calls the model, its own mistakes found before it starts to load."""
    folder = TOYS.get(name, Path(name))
    if name.startswith("hf-hub:") or name in TOYS or folder.is_dir():
        if pretrained is not None:
            raise ModelError(f"the model {name!r} brings its weights with it: leave out --pretrained {pretrained}")
        if name.startswith("hf-hub:"):
            return name
        if not (folder / _CONFIG).is_file():
            raise ModelError(f"the folder {name!r} holds no {_CONFIG}, so it is no model")
        return f"local-dir:{folder}"
    known = open_clip.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, [*known, *TOYS], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()"
        raise ModelError(f"no model or folder is called {name!r}: {hint}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise ModelError(f"{name} needs trained weights: add --pretrained with a file or one of {_some(tags)}")
    if pretrained not in tags and not Path(pretrained).is_file():
        raise ModelError(f"{name} has no weights {pretrained!r}: give a file or one of {_some(tags)}")
    quick = bool((open_clip.get_model_config(name) or {}).get("quick_gelu"))
    if pretrained in tags and bool(open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu")) != quick:
        twin = name.removesuffix("-quickgelu") if quick else f"{name}-quickgelu"
        raise ModelError(f"the weights {pretrained!r} were trained with another activation than {name}'s: use {twin}")
    return name


def _some(tags: list[str]) -> str:
    return ", ".join(tags[:8]) + (", ..." if len(tags) > 8 else "") or "none (no tag is published)"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:400] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """open_clip and the hub's client log what they also raise."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
