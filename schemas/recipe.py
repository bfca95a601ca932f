"""The capture recipe: everything, beside the model, that decides which numbers a store holds."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Self

from schemas.errors import PlanError

CAPTURES: Final[Mapping[str, str]] = {
    "heads": "what each attention head adds",
    "mlps": "what each MLP adds, and the embedding",
    "cls_to_cls": "what the class token's attention to itself adds, by layer",
    "tokens": "what each head adds from each image token",
    "neurons": "what each neuron of an MLP adds through the heads of later layers",
    "direct": "what each neuron of an MLP adds through no later layer",
    "pairs": "what each head of a ResNet's attention pool adds from each of its neurons",
}
LAYERED: Final = ("neurons", "direct")  # of chosen layers: neurons:8-10, neurons:0+8-10, neurons:all
DTYPES: Final = ("float16", "float32")
PRECISIONS: Final = ("fp32", "bf16", "fp16")
LEVELS: Final[Mapping[str, str]] = {
    "coefficients": "all that rebuilds each contribution",
    "scores": "the norm of what is beyond the mean, and its projection on the neuron's direction",
    "significant": "scores of the images over the neuron's threshold",
}

_ALL: Final = "all"
_SPAN: Final = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")


@dataclass(frozen=True)
class Recipe:
    """What is captured, how it is stored, and in which precision the model runs.

    A layered capture names its layers: ``neurons:8-10``. ``level`` and ``fit`` are about ``neurons``.
    """

    capture: tuple[str, ...]
    dtype: str
    precision: str
    level: str = "coefficients"
    fit: str | None = None  # the name of the fit behind scores

    def __post_init__(self) -> None:
        unknown = [name for name in self.capture if name.partition(":")[0] not in CAPTURES]
        if unknown and all(_SPAN.fullmatch(name) for name in unknown):
            raise PlanError(f"layers are joined by '+': write neurons:1+{unknown[0]}, not neurons:1,{unknown[0]}")
        if unknown or not self.capture:
            raise PlanError(f"cannot capture {', '.join(unknown) or 'nothing'}: choose from {', '.join(CAPTURES)}")
        if self.dtype not in DTYPES:
            raise PlanError(f"cannot store {self.dtype}: choose from {', '.join(DTYPES)}")
        if self.precision not in PRECISIONS:
            raise PlanError(f"cannot run the model in {self.precision}: choose from {', '.join(PRECISIONS)}")
        if self.level not in LEVELS:
            raise PlanError(f"cannot keep neurons as {self.level!r}: choose from {', '.join(LEVELS)}")
        if self.level != "coefficients" and "pairs" in self.capture:
            raise PlanError(f"a pair is one number, so there are no {self.level} of it to keep: leave out --neurons")
        if self.level != "coefficients" and not self._layers_text("neurons"):
            raise PlanError(f"only neurons can be kept as {self.level}: add neurons:LAYERS to the capture")

    @classmethod
    def of(
        cls,
        capture: Iterable[str],
        *,
        dtype: str,
        precision: str,
        level: str = "coefficients",
        fit: str | None = None,
    ) -> Self:
        """A recipe whose captures stand in the one canonical order, so that equal recipes are equal."""
        wanted: dict[str, list[str]] = {}
        for text in capture:
            name, colon, layers = text.partition(":")
            if colon and name in CAPTURES and name not in LAYERED:
                raise PlanError(f"cannot capture {text!r}: {name} is captured of all layers, without ':{layers}'")
            wanted.setdefault(name, []).append(layers if colon else _ALL)
        order = [name for name in CAPTURES if name in wanted]
        order += sorted(set(wanted) - set(order))
        names = (f"{name}:{_canonical(name, wanted[name])}" if name in LAYERED else name for name in order)
        return cls(tuple(names), dtype, precision, level, fit)

    def resolved(self, most: Mapping[str, int]) -> Self:
        """The same with ``all`` spelt out, once the model is known.

        Args:
            most: how many layers, from 0 on, have each layered capture.

        Raises:
            PlanError: a layer is out of range.
        """
        names = []
        for text in self.capture:
            name = text.partition(":")[0]
            if name in LAYERED:
                layers = self.layers(name, most[name])
                if not layers or layers[-1] >= most[name]:
                    where = f"layers 0 to {most[name] - 1} of this model have" if most[name] else "no layer of it has"
                    why = ", for no attention follows the last one" if name == "neurons" else ""
                    raise PlanError(f"cannot capture {text}: {where} such neurons{why}")
                text = f"{name}:{_written(layers)}"  # noqa: PLW2901
            names.append(text)
        return replace(self, capture=tuple(names))

    def layers(self, name: str, count: int | None = None) -> tuple[int, ...]:
        """The layers of a layered capture, none if it is not captured.

        Args:
            name: ``neurons`` or ``direct``.
            count: what ``all`` stands for, where the recipe is not resolved yet.
        """
        text = self._layers_text(name)
        if text == _ALL:
            assert count is not None, f"{name}:all is not resolved yet"
            return tuple(range(count))
        return tuple(sorted(_read(name, text))) if text else ()

    @property
    def output_layers(self) -> tuple[int, ...]:
        """The layers of which neurons are captured in any way."""
        return tuple(sorted({*self.layers("neurons"), *self.layers("direct")}))

    @property
    def plain_captures(self) -> tuple[str, ...]:
        """The captures that have no layers to choose."""
        return tuple(name for name in self.capture if ":" not in name)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a store's attributes."""
        return {**asdict(self), "capture": list(self.capture)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; a ``ValueError`` where something is missing or of no sense."""
        capture, fit = values.get("capture"), values.get("fit")
        if fit is not None and not isinstance(fit, str):
            raise ValueError(f"'fit' is {fit!r}")
        return cls.of(
            [str(name) for name in capture] if isinstance(capture, list) else [],
            dtype=str(values.get("dtype")),
            precision=str(values.get("precision")),
            level=str(values.get("level")),
            fit=fit,
        )

    def _layers_text(self, name: str) -> str:
        return next((text.partition(":")[2] for text in self.capture if text.partition(":")[0] == name), "")


def _canonical(name: str, texts: list[str]) -> str:
    if _ALL in texts:
        return _ALL
    return _written(sorted({layer for text in texts for layer in _read(name, text)}))


def _read(name: str, text: str) -> set[int]:
    layers: set[int] = set()
    for part in text.split("+"):
        match = _SPAN.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise PlanError(
                f"{name}:{text} names no layers: write {name}:9, {name}:8-10, {name}:0+8-10 or {name}:{_ALL}"
            )
        layers.update(range(first, last + 1))
    return layers


def _written(layers: Iterable[int]) -> str:
    """Numbers as spans: 0, 8, 9, 10 -> ``0+8-10``."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and spans[-1][1] == layer - 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return "+".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
