"""Two things timed in turn."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Pairs:
    first_s: list[float]
    second_s: list[float]

    @property
    def ratio(self) -> float:
        """The median over pairs of the second's time by the first's."""
        return median(b / a for a, b in zip(self.first_s, self.second_s, strict=True))

    @property
    def spread(self) -> str:
        ratios = [b / a for a, b in zip(self.first_s, self.second_s, strict=True)]
        return f"{min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} pairs"


def time_pairs(first: Callable[[], object], second: Callable[[], object], *, runs: int, warm_up: int = 1) -> Pairs:
    """Times both, A B B A A B ..., so that neither always follows the other."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(-warm_up, runs):
        order = (0, 1) if run % 2 else (1, 0)
        for which in order:
            started = time.perf_counter()
            (first, second)[which]()
            if run >= 0:
                times[which].append(time.perf_counter() - started)
    return Pairs(*times)
