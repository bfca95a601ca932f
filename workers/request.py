"""What a user asks an ingest to do."""

from dataclasses import dataclass
from pathlib import Path

from schemas.recipe import Recipe


@dataclass(frozen=True)
class Request:
    """What a user asks an ingest to do."""

    source: Path
    store: Path
    model: str
    pretrained: str | None
    batch: str
    recipe: Recipe
    device: str  # "auto", or as torch calls it
    batch_size: int
    shard_images: int | None  # None: as many as suit the recipe
    fit: Path | None = None  # the store whose latest fit makes the scores
    force: bool = False  # also where the disk seems too small
