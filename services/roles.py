"""What a component is for, asked of labelled images: what is lost without it, and what is alike in its eyes.

Letters: N images, D joint space, K classes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.components import Component, Constant, Head
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
