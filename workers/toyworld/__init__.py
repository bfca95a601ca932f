"""A small world with known truth: scenes drawn from attributes, and two CLIP models trained on them."""
