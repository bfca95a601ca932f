"""Trains the shipped toy models: ``python -m workers.toyworld.train vit FOLDER`` (or ``resnet``).

The loss is open_clip's contrastive loss. A full caption is found among a batch's others by its colour and background
alone, so a model trained on full captions learns shapes late or never. Here the captions of a batch name the same few
attributes, mostly the shape and two or three others, so that each of them is needed. The transformer learns shapes
faster still if it first sees large, plain, single objects (``--easy-steps``) and starts with a text tower that
already tells them apart (``--text-from``).
"""

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np
import open_clip
import torch
from safetensors.torch import load_file, save_file

from workers.toyworld.attributes import VALUES, Attributes, World, prompts
from workers.toyworld.scenes import SIDE, scene

log = logging.getLogger("train")

EASY: Final = World({"texture": {"plain": 1}, "size": {"large": 1}, "count": {"one": 1}})
TRAIN_SEED: Final = 1
HELD_OUT_SEED: Final = 2
TEXT: Final = {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
VISION: Final[dict[str, dict[str, Any]]] = {
    "vit": {
        "image_size": SIDE,
        "layers": 6,
        "width": 128,
        "head_width": 32,
        "patch_size": 8,
        "pos_embed_type": "sin_cos_2d",  # places learned from nothing come late, and shapes later still
    },
    "resnet": {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
}
MEAN, STD = (0.45, 0.45, 0.45), (0.27, 0.27, 0.27)

Scenes = tuple[torch.Tensor, list[Attributes]]  # (N, 3, H, W)


def main() -> None:
    """Parses the command line, trains, evaluates what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", choices=sorted(VISION))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=40_000)
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--easy-steps", type=int, default=0)
    parser.add_argument("--text-from", type=Path, help="a trained model's folder, whose text tower comes first")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--held-out", type=int, default=2_000)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    log.setLevel(logging.INFO)
    for handler in (logging.StreamHandler(), logging.FileHandler(args.folder / "train.log", mode="w")):
        log.addHandler(handler)
    log.info("%s", {k: str(v) for k, v in vars(args).items() if k not in {"folder", "text_from"}})
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=64, vision_cfg=VISION[args.kind], text_cfg=TEXT)
    if args.text_from:
        _take_text_tower(model, args.text_from)
    held_out = _scenes(World(), HELD_OUT_SEED, args.held_out)
    stages = [(World(), args.steps - args.easy_steps)]
    if args.easy_steps:
        stages.insert(0, (EASY, args.easy_steps))
    _fit(model, [(_scenes(world, TRAIN_SEED, args.scenes), steps) for world, steps in stages], held_out, args)
    _write(model, args.kind, held_out[1], args.folder)
    shipped, _, _ = open_clip.create_model_and_transforms(f"local-dir:{args.folder}")
    log.info("as shipped, on %d held-out scenes: %s", args.held_out, _accuracies(shipped.eval(), *held_out))


def _take_text_tower(model: Any, folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    texts = {name: tensor for name, tensor in state.items() if not name.startswith("visual.")}
    model.load_state_dict(texts, strict=False)
    log.info("the text tower starts from %s", folder.name)


def _scenes(world: World, seed: int, count: int) -> Scenes:
    scenes = [scene(world, seed=seed, index=i) for i in range(count)]
    pictures = np.stack([s.picture for s in scenes]).transpose(0, 3, 1, 2)  # (N, 3, H, W)
    return torch.from_numpy(np.ascontiguousarray(pictures)), [s.attributes for s in scenes]


def _fit(
    model: Any,
    stages: list[tuple[Scenes, int]],
    held_out: Scenes,
    args: argparse.Namespace,
) -> None:
    tokenizer = open_clip.SimpleTokenizer(context_length=TEXT["context_length"])
    loss_of = open_clip.ClipLoss()
    optimizers = _optimizers(model, args.lr)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    rng = np.random.default_rng(0)
    started = time.monotonic()
    batches = chain.from_iterable(_batches(scenes, args.batch_size, steps, rng) for scenes, steps in stages)
    for step, (pictures, captions) in enumerate(batches):
        share = min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * share
        texts = tokenizer(captions)  # (B, context)
        images = _normalise(pictures)  # (B, 3, H, W)
        with torch.autocast("cpu", torch.bfloat16):
            image, text, scale = model(images, texts)
        loss = loss_of(image.float(), text.float(), scale)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.logit_scale.data.clamp_(0, math.log(100))
        if step % 500 == 499:
            model.eval()
            found = _accuracies(model, held_out[0][:500], held_out[1][:500])
            model.train()
            log.info("step %d, %.0f s, loss %.3f: %s", step + 1, time.monotonic() - started, loss.item(), found)


def _optimizers(model: Any, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW; for the matrices of a vision transformer Muon, whose steps do not leave faint directions behind."""
    blocks = getattr(model.visual, "transformer", None)
    matrices = [] if blocks is None else [weight for weight in blocks.parameters() if weight.ndim == 2]
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in chosen]
    adam = torch.optim.AdamW(others, lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    return [adam, torch.optim.Muon(matrices, lr=10 * lr, weight_decay=0.05)] if matrices else [adam]


def _batches(
    scenes: Scenes, size: int, steps: int, rng: np.random.Generator
) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Pictures and captions of each batch; no caption occurs twice in one."""
    pictures, attributes = scenes
    varied = [name for name in VALUES if len({getattr(truth, name) for truth in attributes}) > 1]
    for _ in range(steps):
        mention = _mention(varied, rng) if rng.random() < 0.75 else list(VALUES)
        chosen = rng.choice(len(attributes), size, replace=False)
        captions, first = np.unique([attributes[i].describe(mention) for i in chosen], return_index=True)
        yield pictures[torch.from_numpy(chosen[first])], captions.tolist()


def _mention(varied: list[str], rng: np.random.Generator) -> list[str]:
    """Some attributes, mostly the shape among them, that tell at least 64 kinds of scenes apart."""
    while True:
        mention = [name for name in varied if rng.random() < (0.8 if name == "shape" else 0.35)]
        if math.prod(len(VALUES[name]) for name in mention) >= 64:
            return mention


def _normalise(pictures: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (pictures.float() / 255 - mean) / std


@torch.no_grad()
def _accuracies(model: Any, pictures: torch.Tensor, truths: list[Attributes]) -> dict[str, float]:
    """Zero-shot accuracy of each attribute."""
    tokenizer = open_clip.SimpleTokenizer(context_length=TEXT["context_length"])
    images = torch.cat([model.encode_image(_normalise(part)) for part in pictures.split(250)])  # (N, d)
    found = {}
    for name in VALUES:
        classes = prompts(name)
        texts = model.encode_text(tokenizer(list(classes.values())), normalize=True)  # (classes, d)
        best = (images @ texts.T).argmax(dim=1).tolist()
        right = [list(classes)[b] == getattr(truth, name) for b, truth in zip(best, truths, strict=True)]
        found[name] = round(float(np.mean(right)), 3)
    return found


def _write(model: Any, kind: str, attributes: list[Attributes], folder: Path) -> None:
    config = {
        "model_cfg": {"embed_dim": 64, "vision_cfg": VISION[kind], "text_cfg": TEXT},
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    tokenizer = open_clip.SimpleTokenizer(context_length=TEXT["context_length"])
    said = {truth.caption() for truth in attributes} | {text for name in VALUES for text in prompts(name).values()}
    used = torch.unique(tokenizer(sorted(said)))
    unused = torch.ones(TEXT["vocab_size"], dtype=torch.bool)
    unused[used] = False
    # Embeddings of words that no caption holds are noise: zeros pack to nothing.
    state["token_embedding.weight"] = state["token_embedding.weight"].masked_fill(unused[:, None], 0)
    halves = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_file(halves, folder / "model.safetensors")


if __name__ == "__main__":
    main()
