import numpy as np
import pytest

from schemas.components import Head
from services.roles import Task, ablation_losses, best_retrieval, nearest
from services.store import open_store
from tests.conftest import Ingest


def test_accuracy_and_chance_are_shares() -> None:
    task = Task("t", np.eye(2, 3, dtype=np.float32), np.array([0, 1, 1, 1]))
    representation = np.array([[2, 1, 0], [0, 1, 9], [3, 2, 0], [0, 5, 0]], np.float32)
    assert task.accuracy(representation) == 0.75
    assert task.chance == 0.75


def test_nearest_are_those_of_the_smallest_angle_and_never_itself() -> None:
    points = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    centred = points - points.mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    found = nearest(points, 5)
    for place in range(30):
        others = [other for other in range(30) if other != place]
        assert found[place].tolist() == sorted(others, key=lambda other: -float(unit[place] @ unit[other]))[:5]


def test_ablation_is_the_loss_without_a_component(ingest: Ingest) -> None:
    ingest()
    store = open_store(ingest.request.store)
    texts = np.random.default_rng(1).normal(size=(5, 32)).astype(np.float32)
    task = Task("t", texts, (store.representation() @ texts.T).argmax(axis=1))
    losses = ablation_losses(store, [task])
    assert len(losses) == 4 * 4 + 4 + 1
    part = store.contribution("head:3.2")
    ablated = store.representation() - part + part.mean(axis=0)
    assert losses[Head(3, 2)]["t"] == pytest.approx(1 - task.accuracy(ablated))
    assert all(loss["t"] >= 0 for loss in losses.values()), "the truth here is the whole model's own choice"


def test_the_best_head_retrieves_best(ingest: Ingest) -> None:
    ingest()
    store = open_store(ingest.request.store)
    truth = (store.heads(layer=2, head=3)[:, 0] > 0).astype(np.intp)
    found = best_retrieval(store, truth, 3)
    neighbours = nearest(store.contribution(found.head), 3)
    assert np.array_equal(found.neighbours, neighbours)
    assert found.precision == pytest.approx((truth[neighbours] == truth[:, None]).mean())
