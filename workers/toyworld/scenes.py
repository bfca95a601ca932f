"""Draws toy scenes: 64x64 pictures whose attributes and object pixels are known exactly.

Letters: H, W picture rows and columns; K objects in a scene.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from workers.toyworld.attributes import Attributes, World

SIDE: Final = 64

Plane = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]
Picture = NDArray[np.uint8]

_RGB: Final = {
    "red": (214, 30, 34),
    "orange": (245, 130, 20),
    "yellow": (250, 225, 45),
    "green": (25, 165, 55),
    "cyan": (50, 210, 215),
    "blue": (35, 65, 215),
    "purple": (130, 40, 170),
    "pink": (250, 135, 190),
}
_RADIUS: Final = {"small": 10.5, "medium": 13.5, "large": 17.0}
_SHRINK: Final = {"one": 1.0, "two": 0.85, "three": 0.76}
_TOWARDS: Final = {"centre": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
_LAYOUT: Final = {
    "one": ((0.0, 0.0),),
    "two": ((-1.1, 0.0), (1.1, 0.0)),
    "three": ((-1.1, 0.8), (1.1, 0.8), (0.0, -1.1)),
}


@dataclass(frozen=True)
class Scene:
    """One picture with its truth."""

    attributes: Attributes
    picture: Picture  # (H, W, 3)
    masks: Mask  # (K, H, W), one per object; they do not overlap


def scene(world: World, *, seed: int, index: int) -> Scene:
    """Scene ``index`` of the endless series ``seed``: the same arguments always give the same scene."""
    rng = np.random.default_rng((seed, index))
    return draw(world.draw(rng), rng)


def draw(attributes: Attributes, rng: np.random.Generator) -> Scene:
    """A picture of ``attributes``; what they leave open (angles, exact places, grain) comes from ``rng``."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE].astype(float) + 0.5  # (H, W) each
    picture = _background(attributes.background, rows, columns, rng)  # (H, W, 3)
    radius = _RADIUS[attributes.size] * _SHRINK[attributes.count] * rng.uniform(0.92, 1.08)
    colour = np.array(_RGB[attributes.colour]) + rng.normal(0, 8, 3)
    taken = np.zeros((SIDE, SIDE), bool)
    masks: list[Mask] = []
    for x, y in _centres(attributes, radius, rng):
        angle = rng.uniform(-0.26, 0.26)
        right, down = (columns - x) / radius, (rows - y) / radius
        u = np.cos(angle) * right + np.sin(angle) * down
        v = np.cos(angle) * down - np.sin(angle) * right
        inside = _inside(attributes.shape, u, v)  # (H, W)
        shade = _shade(attributes.texture, u * radius, v * radius)  # (H, W)
        picture[inside] = colour * shade[inside, None]
        picture[_rim(inside) & ~taken] *= 0.35
        taken |= inside
        masks.append(inside)
    return Scene(attributes, np.clip(picture, 0, 255).astype(np.uint8), np.stack(masks))


def _centres(attributes: Attributes, radius: float, rng: np.random.Generator) -> NDArray[np.float64]:
    offsets = np.array(_LAYOUT[attributes.count]) * radius  # (K, 2) as x, y
    shift = np.array(_TOWARDS[attributes.position]) * 15 + rng.uniform(-3, 3, 2)
    extent = np.abs(offsets).max(axis=0) + radius
    centre = np.clip(SIDE / 2 + shift, extent, np.maximum(SIDE - extent, extent))
    centres: NDArray[np.float64] = centre + offsets
    return centres


def _inside(shape: str, u: Plane, v: Plane) -> Mask:
    """Where the shape is, in coordinates whose unit is its radius; ``v`` points down. (H, W) -> (H, W)"""
    distance = np.hypot(u, v)
    match shape:
        case "circle":
            inside = distance < 0.9
        case "square":
            inside = np.maximum(abs(u), abs(v)) < 0.8
        case "triangle":
            inside = (v < 0.7) & (v > 1.75 * abs(u) - 0.95)
        case "star":
            turn = np.abs((np.arctan2(u, -v) * 5 / (2 * np.pi) + 0.5) % 1 - 0.5) * 2  # 0 at a tip, 1 between two
            inside = distance < 1.0 - 0.62 * turn
        case "cross":
            inside = (np.minimum(abs(u), abs(v)) < 0.28) & (np.maximum(abs(u), abs(v)) < 0.92)
        case "heart":
            x, y = u * 1.25, -v * 1.25 + 0.1
            inside = (x**2 + y**2 - 1) ** 3 - x**2 * y**3 < 0
        case "ring":
            inside = (distance < 0.95) & (distance > 0.52)
        case "moon":
            inside = (distance < 0.95) & (np.hypot(u - 0.5, v) > 0.75)
        case _:
            raise ValueError(f"no shape is called {shape!r}")
    return inside & (distance < 1.0)


def _rim(inside: Mask) -> Mask:
    """The pixels around a mask, which are darkened so that an object stands out on any background. (H, W)"""
    padded = np.pad(inside, 1)
    grown = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return grown & ~inside


def _shade(texture: str, x: Plane, y: Plane) -> Plane:
    """Brightness of an object's surface, ``x`` and ``y`` in pixels from its centre. (H, W)"""
    match texture:
        case "plain":
            dark = np.zeros(x.shape, bool)
        case "striped":
            dark = (y % 5) < 2
        case "dotted":
            dark = np.hypot(x % 6 - 3, y % 6 - 3) < 1.8
        case "chequered":
            dark = ((x // 4) + (y // 4)) % 2 == 0
        case _:
            raise ValueError(f"no texture is called {texture!r}")
    return np.where(dark, 0.55, 1.0)


def _background(name: str, rows: Plane, columns: Plane, rng: np.random.Generator) -> NDArray[np.float64]:
    """(H, W, 3)"""
    phase = rng.uniform(0, 16, 2)
    x, y = columns + phase[0], rows + phase[1]
    grain = rng.normal(0, 1, (SIDE, SIDE))
    light: Plane
    match name:
        case "grass":
            base, light = (70, 120, 50), 18 * np.repeat(rng.normal(0, 1, (SIDE // 4, SIDE)), 4, axis=0)
        case "water":
            base, light = (50, 100, 150), 28 * np.sin(y * 0.8 + 2 * np.sin(x * 0.15)) + 4 * grain
        case "sand":
            base, light = (205, 180, 130), 14 * np.sin((x + y) * 0.25 + np.sin(y * 0.2)) + 9 * grain
        case "brick":
            joint = (y % 8 < 1.5) | ((x + 8 * (y // 8 % 2)) % 16 < 1.5)
            base, light = (150, 80, 65), np.where(joint, 60, 6 * grain)
        case "snow":
            base, light = (232, 236, 242), np.where(grain > 1.6, -40, 4 * grain)
        case "night":
            base, light = (18, 20, 45), np.where(grain > 2.2, 190, 3 * grain)
        case "wood":
            base, light = (120, 85, 50), 22 * np.sin(x * 0.7 + 1.5 * np.sin(y * 0.08)) + 5 * grain
        case "stone":
            base, light = (125, 125, 125), 22 * np.kron(rng.normal(0, 1, (SIDE // 8, SIDE // 8)), np.ones((8, 8)))
        case _:
            raise ValueError(f"no background is called {name!r}")
    tint = rng.normal(0, 5, 3)
    return np.asarray(np.array(base) + tint + light[..., None], np.float64)
