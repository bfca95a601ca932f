"""What a store and its batches say about themselves, kept in the attributes of their Zarr groups."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Self

from schemas.recipe import Recipe

FORMAT: Final = 2
KEY: Final = "spectrograph"
FAMILIES: Final = ("vit", "resnet")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What of an image encoder decides the shapes of a store."""

    family: str  # one of FAMILIES
    layers: int  # of attention; a ResNet's pool is its only one
    heads: int
    coefficients: int  # numbers per head
    tokens: int
    neurons: int  # of each MLP; of a ResNet, the channels that its pool reads
    width: int  # of the residual stream; of a ResNet, its channels
    dim: int  # of the joint image-text space
    terms: int  # constants per image

    @property
    def neuron_layers(self) -> dict[str, int]:
        """How many layers, from 0 on, have neurons of each layered capture: the last one is followed by no other."""
        transformer = self.layers if self.family == "vit" else 0
        return {"neurons": max(0, transformer - 1), "direct": transformer}


@dataclass(frozen=True, kw_only=True)
class Model(Sizes):
    """The image encoder behind a store."""

    name: str
    pretrained: str | None
    fingerprint: str  # SHA-256 of all weights
    config: Mapping[str, Any]  # open_clip's
    preprocessing: Mapping[str, Any]  # how a file becomes the model's input

    def to_json(self) -> dict[str, Any]:
        """Plain values for a store's attributes."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; a ``ValueError`` where something is missing or of no sense."""
        model = cls(**typed(cls, values))
        if model.family not in FAMILIES:
            raise ValueError(f"'family' is {model.family!r}")
        return model


@dataclass(frozen=True)
class Manifest:
    """A store's own description: enough to read it without the code that wrote it."""

    model: Model
    recipe: Recipe
    libraries: Mapping[str, str]
    created: str  # ISO 8601, UTC

    def to_json(self) -> dict[str, Any]:
        """The attributes of the root group."""
        return {
            KEY: {
                "format": FORMAT,
                "created": self.created,
                "model": self.model.to_json(),
                "recipe": self.recipe.to_json(),
                "libraries": dict(self.libraries),
            }
        }

    @classmethod
    def from_json(cls, attributes: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; a ``ValueError`` where something is missing or of no sense."""
        values = typed(cls, attributes.get(KEY))
        values["model"] = Model.from_json(values["model"])
        values["recipe"] = recipe = Recipe.from_json(values["recipe"])
        if recipe != recipe.resolved(values["model"].neuron_layers):
            raise ValueError(f"'capture' is {list(recipe.capture)!r}")
        if (recipe.level == "coefficients") != (recipe.fit is None):
            raise ValueError(f"'level' is {recipe.level!r} and 'fit' is {recipe.fit!r}")
        return cls(**values)

    def model_differences(
        self, fingerprint: str, config: Mapping[str, Any], preprocessing: Mapping[str, Any]
    ) -> list[str]:
        """What would make another model write other numbers into this store, in words."""
        weights = _differences([("model weights", self.model.fingerprint[:12], fingerprint[:12])])
        if weights:
            return weights  # the rest of another model is other, too
        configs = _parts("model config", _plain(self.model.config), _plain(config))
        return _differences(
            [*configs, *_parts("preprocessing", _plain(self.model.preprocessing), _plain(preprocessing))]
        )

    def recipe_differences(self, recipe: Recipe) -> list[str]:
        """What would make another recipe write other numbers into this store, in words."""
        pairs = [
            ("capture", ",".join(self.recipe.capture), ",".join(recipe.capture)),
            ("dtype", self.recipe.dtype, recipe.dtype),
            ("precision", self.recipe.precision, recipe.precision),
            ("neurons as", self.recipe.level, recipe.level),
            ("fit", self.recipe.fit, recipe.fit),
        ]
        return _differences(pairs)


@dataclass(frozen=True)
class Batch:
    """A named group of images, listed once and then written shard by shard."""

    source: str
    images: int
    shard_images: int
    listing: str  # SHA-256 of the listing: names, labels and extra columns
    created: str  # ISO 8601, UTC

    @property
    def shards(self) -> int:
        """How many shards hold the batch."""
        return -(-self.images // self.shard_images)

    def rows(self, shard: int) -> range:
        """The rows of the batch that one shard holds."""
        first = shard * self.shard_images
        return range(first, min(first + self.shard_images, self.images))

    def to_json(self) -> dict[str, Any]:
        """The attributes of the batch's group."""
        return {KEY: asdict(self)}

    @classmethod
    def from_json(cls, attributes: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; a ``ValueError`` where something is missing or of no sense."""
        return cls(**typed(cls, attributes.get(KEY)))


def typed(cls: type, values: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """The values of a dataclass's fields, as far as JSON can show that they are right: else a ``ValueError``."""
    found = {}
    for field in fields(cls):
        if field.name in without:
            continue
        value = values.get(field.name) if isinstance(values, Mapping) else None
        if field.type is int:
            right = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        elif field.type in (str, str | None):
            right = isinstance(value, str) or (value is None and field.type is not str)
        else:
            right = isinstance(value, Mapping)
        if not right:
            raise ValueError(f"{field.name!r} is {value!r}")
        found[field.name] = value
    return found


def _differences(pairs: Iterable[tuple[str, Any, Any]]) -> list[str]:
    return [f"{what} {here} in the store, {there} asked for" for what, here, there in pairs if here != there]


def _parts(what: str, here: Any, there: Any) -> Iterator[tuple[str, Any, Any]]:
    """Both sides of a nested mapping, value by value."""
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        for key in sorted({*here, *there}):
            yield from _parts(f"{what} {key}", here.get(key), there.get(key))
    else:
        yield what, here, there


def _plain(value: Any) -> Any:
    """JSON turns tuples into lists: compare what was read with what would be written."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
