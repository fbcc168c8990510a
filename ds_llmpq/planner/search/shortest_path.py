"""Shortest paths over (layers done, devices used): all orders, subsets and interleavings of devices at once.

A state is (first layer not yet placed, number of devices used per class, class of the last stage). Costs to go are
computed backwards for a batch of boxes; then paths are read off forwards. Without counts the device limits are left
to the caller (as prices), and an order can be enforced by infinite links.
"""

from dataclasses import dataclass

import numpy as np


class PathSpace:
    """Counts of devices used per class as flat states; `counts=None` drops them (one state)."""

    def __init__(self, classes: int, counts: list[int] | None):
        self.classes = classes
        sizes = [count + 1 for count in counts] if counts is not None else []
        self.states = int(np.prod(sizes)) if counts is not None else 1
        self.next = np.zeros((self.states, classes), dtype=np.int64)  # the state with one more device of the class
        self.full = np.zeros((self.states, classes), dtype=bool)
        for c, size in enumerate(sizes):
            stride = int(np.prod(sizes[c + 1 :]))
            used = np.arange(self.states) // stride % size
            self.full[:, c] = used + 1 >= size
            self.next[:, c] = np.where(self.full[:, c], 0, np.arange(self.states) + stride)
        self.columns = np.arange(classes)

    def costs_to_go(self, stage: np.ndarray, link: np.ndarray, final: np.ndarray) -> "CostsToGo":
        """Costs of placing the layers from each one on, for `stage[C, L, K]` at (a, k - 1), `link[C, C]` from class to
        class, and `final[C]` that follows the last stage."""
        _, layers, longest = stage.shape
        after = np.full((layers + 1, self.states, self.classes), np.inf)
        lead = np.full_like(after, np.inf)
        after[layers] = np.where(self.full, np.inf, final)
        for a in range(layers - 1, -1, -1):
            reach = min(longest, layers - a)
            lead[a] = (stage[:, a, :reach].T[:, None, :] + after[a + 1 : a + 1 + reach]).min(axis=0)
            onward = (lead[a][:, None, :] + link).min(axis=2)  # [S, last class]
            after[a] = np.where(self.full, np.inf, onward[self.next, self.columns])
        return CostsToGo(self, stage, link, lead, after)


@dataclass(frozen=True)
class CostsToGo:
    """`lead[a, s, c]`: a stage of class c begins at layer a, s counts the devices used before; the link that leads to
    it is not included. `after[b, s, c]`: what follows a stage of class c, begun at s, that ended at layer b."""

    space: PathSpace
    stage: np.ndarray
    link: np.ndarray
    lead: np.ndarray
    after: np.ndarray

    @property
    def least(self) -> float:
        """The cost of the best path."""
        return float(self.lead[0, 0].min())

    def path(self) -> list["PathStep"]:
        """The best path: stages in pipeline order."""
        _, layers, longest = self.stage.shape
        a, state, last, steps = 0, 0, -1, []
        while a < layers:
            c = int(np.argmin(self.lead[a, state] + (self.link[last] if last >= 0 else 0.0)))
            reach = min(longest, layers - a)
            k = 1 + int(np.argmin(self.stage[c, a, :reach] + self.after[a + 1 : a + 1 + reach, state, c]))
            steps.append(PathStep(c, a, a + k))
            a, state, last = a + k, int(self.space.next[state, c]), c
        return steps


@dataclass(frozen=True)
class PathStep:
    """One stage of a path: layers [first, last) on some device of class `kind`."""

    kind: int
    first: int
    last: int
