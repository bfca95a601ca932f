"""What a toy scene is made of, how often, and how it is put into words."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Final

import numpy as np

SHAPES: Final = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "moon")
COLOURS: Final = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
TEXTURES: Final = ("plain", "striped", "dotted", "chequered")
SIZES: Final = ("small", "medium", "large")
POSITIONS: Final = ("centre", "left", "right", "top", "bottom")
COUNTS: Final = ("one", "two", "three")
BACKGROUNDS: Final = ("grass", "water", "sand", "brick", "snow", "night", "wood", "stone")

Weights = Mapping[str, float]


@dataclass(frozen=True)
class Attributes:
    """The truth about one scene; every field is one of the words above."""

    shape: str
    colour: str
    texture: str
    size: str
    position: str
    count: str
    background: str

    def caption(self) -> str:
        """The scene in words, every attribute named."""
        return self.describe(VALUES)

    def describe(self, mention: Collection[str]) -> str:
        """The scene in words, naming only the attributes in ``mention``: ``two red stars on snow``."""
        named = {name: value for name, value in asdict(self).items() if name in mention}
        noun = named.get("shape", "object")
        if named.get("count", "one") != "one":
            noun += "es" if noun == "cross" else "s"
        adjectives = [named[name] for name in ("size", "texture", "colour") if name in named]
        phrase = " ".join([*adjectives, noun])
        article = "an" if phrase[0] in "aeiou" else "a"
        words = [named.get("count", article), phrase]
        if "background" in named:
            words += ["on", named["background"]]
        if "position" in named:
            words += ["in the centre" if named["position"] == "centre" else f"at the {named['position']}"]
        return " ".join(words)

    def labels(self) -> dict[str, str]:
        """Attribute names and values, in a fixed order."""
        return asdict(self)


VALUES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "shape": SHAPES,
        "colour": COLOURS,
        "texture": TEXTURES,
        "size": SIZES,
        "position": POSITIONS,
        "count": COUNTS,
        "background": BACKGROUNDS,
    }
)
assert tuple(VALUES) == tuple(f.name for f in fields(Attributes))


def prompts(attribute: str) -> dict[str, str]:
    """A text for each value of one attribute, which mentions nothing else: the classes of a zero-shot task."""
    anything = {name: values[0] for name, values in VALUES.items()}
    return {value: Attributes(**{**anything, attribute: value}).describe({attribute}) for value in _values(attribute)}


@dataclass(frozen=True)
class Cue:
    """A planted correlation: where ``attribute`` is ``value``, ``target`` follows ``weights`` instead."""

    attribute: str
    value: str
    target: str
    weights: Weights

    def __post_init__(self) -> None:
        order = tuple(VALUES)
        for name in (self.attribute, self.target):
            _values(name)
        if order.index(self.attribute) >= order.index(self.target):
            raise ValueError(f"a cue runs from one of {order} to a later one, not {self.attribute} to {self.target}")
        if self.value not in VALUES[self.attribute]:
            raise ValueError(f"{self.attribute} has no value {self.value!r}; it is one of {VALUES[self.attribute]}")
        _probabilities(self.target, self.weights)


@dataclass(frozen=True)
class World:
    """The distribution of every attribute; an attribute not named is uniform.

    Cues are applied in the order of the attributes, so a shift of one attribute carries over to what depends on it.
    """

    weights: Mapping[str, Weights] = field(default_factory=dict)
    cues: tuple[Cue, ...] = ()

    def __post_init__(self) -> None:
        for name, weights in self.weights.items():
            _probabilities(name, weights)

    def draw(self, rng: np.random.Generator) -> Attributes:
        """One scene's attributes."""
        drawn: dict[str, str] = {}
        for name, values in VALUES.items():
            weights = self.weights.get(name)
            for cue in self.cues:
                if cue.target == name and drawn.get(cue.attribute) == cue.value:
                    weights = cue.weights
            drawn[name] = values[int(rng.choice(len(values), p=_probabilities(name, weights)))]
        return Attributes(**drawn)


def _values(name: str) -> tuple[str, ...]:
    if name not in VALUES:
        raise ValueError(f"no attribute is called {name!r}; there are {tuple(VALUES)}")
    return VALUES[name]


def _probabilities(name: str, weights: Weights | None) -> np.ndarray:
    values = _values(name)
    if weights is None:
        return np.full(len(values), 1 / len(values))
    unknown = sorted(set(weights) - set(values))
    total = sum(weights.values())
    if unknown or total <= 0 or min(weights.values()) < 0:
        raise ValueError(f"weights of {name} are positive numbers for some of {values}, not {dict(weights)}")
    return np.array([weights.get(value, 0.0) / total for value in values])
