"""The capture recipe: everything, beside the model, that decides which numbers a store holds."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from schemas.errors import PlanError

CAPTURES: Final[Mapping[str, str]] = {
    "heads": "what each attention head adds",
    "mlps": "what each MLP adds, and the embedding",
    "cls_to_cls": "what the class token's attention to itself adds, by layer",
    "tokens": "what each head adds from each image token",
}
DTYPES: Final = ("float16", "float32")
PRECISIONS: Final = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Recipe:
    """What is captured, how it is stored, and in which precision the model runs."""

    capture: tuple[str, ...]
    dtype: str
    precision: str

    def __post_init__(self) -> None:
        unknown = [name for name in self.capture if name not in CAPTURES]
        if unknown or not self.capture:
            raise PlanError(f"cannot capture {', '.join(unknown) or 'nothing'}: choose from {', '.join(CAPTURES)}")
        if self.dtype not in DTYPES:
            raise PlanError(f"cannot store {self.dtype}: choose from {', '.join(DTYPES)}")
        if self.precision not in PRECISIONS:
            raise PlanError(f"cannot run the model in {self.precision}: choose from {', '.join(PRECISIONS)}")

    @classmethod
    def of(cls, capture: Iterable[str], *, dtype: str, precision: str) -> Self:
        """A recipe whose captures stand in the one canonical order, so that equal recipes are equal."""
        wanted = set(capture)
        order = [name for name in CAPTURES if name in wanted]
        return cls((*order, *sorted(wanted - set(order))), dtype, precision)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a store's attributes."""
        return {**asdict(self), "capture": list(self.capture)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; a ``ValueError`` where something is missing or of no sense."""
        capture = values.get("capture")
        return cls(
            tuple(capture if isinstance(capture, list) else ()), values.get("dtype", ""), values.get("precision", "")
        )
