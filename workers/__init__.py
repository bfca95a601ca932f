"""What runs next to a GPU: models, their decomposition, image sources, and writing shards."""
