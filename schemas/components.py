"""How the parts of an image encoder are called: ``head:11.3``, ``neuron:9.624``, ``embedding``.

Layers, heads and neurons count from 0, as open_clip counts them, in Python, SQL, on the command line and in pages.
"""

import re
from dataclasses import dataclass
from typing import Final

from schemas.errors import ComponentError

_GRAMMAR: Final = "head:LAYER.HEAD, mlp:LAYER, neuron:LAYER.INDEX, pair:NEURON.HEAD, embedding or constant"
_NAME: Final = re.compile(r"(?P<kind>[a-z]+)(?::(?P<first>0|[1-9]\d{0,8})(?:\.(?P<second>0|[1-9]\d{0,8}))?)?")


@dataclass(frozen=True, order=True)
class Head:
    """An attention head of a transformer."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"head:{self.layer}.{self.head}"


@dataclass(frozen=True, order=True)
class Mlp:
    """The MLP of a transformer's block."""

    layer: int

    def __str__(self) -> str:
        return f"mlp:{self.layer}"


@dataclass(frozen=True, order=True)
class Neuron:
    """A hidden unit of the MLP of a transformer's block."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"neuron:{self.layer}.{self.index}"


@dataclass(frozen=True, order=True)
class Pair:
    """A channel of a ResNet's last feature map, read by one head of the attention pool."""

    neuron: int
    head: int

    def __str__(self) -> str:
        return f"pair:{self.neuron}.{self.head}"


@dataclass(frozen=True, order=True)
class Embedding:
    """What enters the first block."""

    def __str__(self) -> str:
        return "embedding"


@dataclass(frozen=True, order=True)
class Constant:
    """What is left: biases and the means of LayerNorms, the same for all images up to a few scales."""

    def __str__(self) -> str:
        return "constant"


Component = Head | Mlp | Neuron | Pair | Embedding | Constant

_KINDS: Final[dict[tuple[str, int], type[Component]]] = {
    ("head", 2): Head,
    ("mlp", 1): Mlp,
    ("neuron", 2): Neuron,
    ("pair", 2): Pair,
    ("embedding", 0): Embedding,
    ("constant", 0): Constant,
}


def parse(name: str) -> Component:
    """The component called ``name``; ``str`` of a component is its inverse.

    Raises:
        ComponentError: no component has such a name.
    """
    match = _NAME.fullmatch(name)
    if match:
        numbers = [int(text) for text in match.group("first", "second") if text is not None]
        kind = _KINDS.get((match["kind"], len(numbers)))
        if kind:
            return kind(*numbers)
    raise ComponentError(f"{name!r} names no component; a name is {_GRAMMAR}")
