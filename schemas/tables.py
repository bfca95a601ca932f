"""The Arrow schemas of the tables, one Parquet file per shard."""

from typing import Final

import pyarrow as pa

# What the store itself says of an image; a source may add columns of other names.
IMAGE_COLUMNS: Final = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),  # BATCH/NAME, unique in the store
        pa.field("batch", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),  # in the batch's arrays
        pa.field("source", pa.string(), nullable=False),  # where the image came from
        pa.field("label", pa.string()),
        pa.field("sha256", pa.string()),  # of the file's content; null if it could not be read at all
        pa.field("bytes", pa.int64()),
        pa.field("format", pa.string()),
        pa.field("width", pa.int32()),  # as shown, after EXIF rotation
        pa.field("height", pa.int32()),
        pa.field("error", pa.string()),  # why the image is not stored; null if it is
    ]
)

# The significant scores of a shard, sorted by layer, neuron and row, so that one neuron lies together.
SIGNIFICANT_COLUMNS: Final = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),  # of the batch's arrays
        pa.field("norm", pa.float32(), nullable=False),
        pa.field("projection", pa.float32(), nullable=False),
    ]
)


def image_schema(extra: pa.Schema) -> pa.Schema:
    """The columns of a batch's image table: the fixed ones, then the source's own."""
    return pa.schema([*IMAGE_COLUMNS, *extra])
