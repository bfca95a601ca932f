"""What a component is for, asked of labelled images: what is lost without it, what is alike in its eyes, what it is on.

Letters: N images, D joint space, K classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.components import Component, Constant, Head, Neuron, Pair
from services.contributions import Contributions
from services.store import Store


@dataclass(frozen=True)
class Task:
    """A zero-shot task: which of some texts fits an image."""

    name: str
    texts: Contributions  # unit vectors, (K, D)
    truth: NDArray[np.intp]  # the right text of each image, (N,)

    def accuracy(self, representation: Contributions) -> float:
        """The share of images whose best text is the right one. (N, D)"""
        return float(((representation @ self.texts.T).argmax(axis=1) == self.truth).mean())

    @property
    def chance(self) -> float:
        """The accuracy of naming the most frequent class always."""
        return float(np.bincount(self.truth).max() / len(self.truth))


def ablation_losses(store: Store, tasks: list[Task]) -> dict[Component, dict[str, float]]:
    """The accuracy that each task loses when one component is replaced by its mean: mean ablation.

    Returns:
        For each component but the constant, by task, the loss in accuracy; negative where ablation helps.
    """
    whole = store.representation()  # (N, D)
    before = {task.name: task.accuracy(whole) for task in tasks}
    losses: dict[Component, dict[str, float]] = {}
    for component in store.components():
        if isinstance(component, Constant):
            continue
        part = store.contribution(component)  # (N, D)
        ablated = whole - part + part.mean(axis=0)
        losses[component] = {task.name: before[task.name] - task.accuracy(ablated) for task in tasks}
    return losses


def nearest(contributions: Contributions, count: int) -> NDArray[np.intp]:
    """For each image, the others whose contributions point the most alike, best first. (N, D) -> (N, count)"""
    centred = contributions - contributions.mean(axis=0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    alike = unit @ unit.T  # (N, N)
    np.fill_diagonal(alike, -np.inf)
    return np.argsort(-alike, axis=1, kind="stable")[:, :count]


@dataclass(frozen=True)
class Retrieval:
    """How well the nearest images by one head share an attribute."""

    head: Head
    precision: float
    neighbours: NDArray[np.intp]  # (N, count)


def best_retrieval(store: Store, truth: NDArray[np.intp], count: int) -> Retrieval:
    """The head by whose contributions the nearest images share ``truth`` the most often."""
    found = []
    for component in store.components():
        if isinstance(component, Head):
            neighbours = nearest(store.contribution(component), count)
            found.append(Retrieval(component, float((truth[neighbours] == truth[:, None]).mean()), neighbours))
    return max(found, key=lambda retrieval: retrieval.precision)


@dataclass(frozen=True)
class Selective:
    """A neuron or pair, and what the images in which it is significant have in common."""

    component: Neuron | Pair
    value: int  # the class that most of them share
    share: float  # of them
    named: int  # the class whose text lies the most along its direction
    images: NDArray[np.intp]  # places in `store.images()`, of the largest norm first


def most_selective(store: Store, task: Task, count: int) -> list[Selective]:
    """The neurons, or pairs of a ResNet, whose significant images agree the most on a class; the stronger ones first.

    Args:
        store: with a fit.
        task: whose classes.
        count: how many to return.
    """
    places = {name: place for place, name in enumerate(store.images()["image_id"].to_pylist())}
    texts = task.texts - task.texts.mean(axis=0)  # (K, D)
    found = []
    for table, directions in _significant(store):
        image = np.array([places[name] for name in table["image_id"].to_pylist()], np.intp)
        ids = np.stack([table[name].to_numpy() for name in table.column_names[1:3]], axis=1).astype(int)
        starts = np.flatnonzero(np.any(np.diff(ids, axis=0, prepend=-1), axis=1))
        norms = table["norm"].to_numpy()
        kind = Pair if "head" in table.column_names else Neuron
        for first, last in zip(starts, [*starts[1:], len(ids)], strict=True):
            classes = np.bincount(task.truth[image[first:last]], minlength=len(task.texts))
            named = int((texts @ directions[tuple(ids[first])]).argmax())
            one = Selective(
                kind(*ids[first].tolist()),
                int(classes.argmax()),
                float(classes.max() / classes.sum()),
                named,
                image[first:last],
            )
            found.append((one, float(norms[first:last].mean())))
    found.sort(key=lambda pair: (-pair[0].share, -pair[1]))
    return [one for one, _ in found[:count]]


def _significant(store: Store) -> Iterator[tuple[pa.Table, dict[tuple[int, ...], Contributions]]]:
    """Significant images and directions, of one layer after the other, or of all pairs."""
    model = store.manifest.model
    if model.family == "resnet":
        vectors = store.directions(head=slice(None))  # (n, H, D)
        yield store.significant(head=slice(None)), {pair: vectors[pair] for pair in np.ndindex(vectors.shape[:2])}
        return
    for layer in store.fit().layers:
        vectors = store.directions(layer)  # (n, D)
        yield store.significant(layer), {(layer, at): vector for at, vector in enumerate(vectors)}
