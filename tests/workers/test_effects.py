"""Factors of rows: norms without vectors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.effects import MlpEffects, PairEffects, factors, rows


def effects(neurons: int, count: int, dim: int, seed: int = 0) -> MlpEffects:
    width, inner = 6, 3
    rng = np.random.default_rng(seed)
    outputs, reads = rng.normal(size=(neurons, width)), rng.normal(size=(count, width, inner))
    heads = np.linalg.qr(rng.normal(size=(count, dim, inner)))[0].swapaxes(1, 2)
    return MlpEffects(*(array.astype(np.float32) for array in (outputs, reads, heads)))


@given(
    neurons=st.integers(1, 9),
    count=st.integers(1, 7),
    dim=st.integers(4, 12),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 9),
)
@settings(deadline=None)
def test_norms_by_factors_are_norms_of_the_vectors(neurons: int, count: int, dim: int, scale: float, seed: int) -> None:
    made = effects(neurons, count, dim, seed)
    every = np.arange(neurons)
    numbers = scale * np.random.default_rng(seed).normal(size=(neurons, 5, count))
    vectors = numbers @ rows(made, every).astype(float)  # (n, N, D)
    by_factor = np.linalg.norm(numbers @ factors(made, every), axis=2)
    # Rows that cancel leave a rest of the size of what was cancelled.
    largest = np.abs(numbers).sum(axis=2) * np.linalg.norm(rows(made, every), axis=2).max(axis=1)[:, None]
    np.testing.assert_allclose(by_factor, np.linalg.norm(vectors, axis=2), atol=2e-6 * largest.max(), rtol=1e-5)


def test_rows_are_reads_through_the_heads() -> None:
    made = effects(5, 4, 8)
    truth = np.einsum("nw,rwe,red->nrd", made.outputs, made.reads, made.heads)
    np.testing.assert_allclose(rows(made, np.array([3, 0])), truth[[3, 0]], atol=1e-5)


def test_a_dead_neuron_and_rows_that_repeat_have_factors() -> None:
    made = effects(3, 4, 8)
    made.outputs[1] = 0
    repeated = MlpEffects(made.outputs, np.repeat(made.reads[:1], 4, axis=0), np.repeat(made.heads[:1], 4, axis=0))
    for case in (made, repeated):
        found = factors(case, np.arange(3))
        assert np.isfinite(found).all()
        gram = rows(case, np.arange(3)) @ rows(case, np.arange(3)).swapaxes(1, 2)
        np.testing.assert_allclose(found @ found.swapaxes(1, 2), gram, atol=1e-5)


def test_pairs_have_a_row_for_each_head() -> None:
    rng = np.random.default_rng(1)
    reads, heads = rng.normal(size=(6, 2, 3)).astype("f"), rng.normal(size=(2, 3, 5)).astype("f")
    made = PairEffects(reads, heads)
    assert len(made) == 6
    np.testing.assert_allclose(rows(made, np.arange(6)), np.einsum("nre,red->nrd", reads, heads), atol=1e-5)


def test_blocks_do_not_change_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    made = effects(9, 4, 8)
    whole = factors(made, np.arange(9))
    monkeypatch.setattr("workers.effects._BLOCK_BYTES", 600)
    np.testing.assert_array_equal(factors(made, np.arange(9)), whole)
