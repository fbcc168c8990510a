"""Which devices are interchangeable, and how far apart classes of them are.

Exact classes share type, memory, pins and every link cost; merged classes share type and memory only, and take the
cheapest link between any two members, which keeps lower bounds valid.
"""

from dataclasses import dataclass

import numpy as np

from ds_llmpq.planner.problem import Problem


@dataclass(frozen=True)
class Classes:
    """`members[c]` are device indices; `kind[c]` numbers equal (type, memory, pin) combinations."""

    members: list[list[int]]
    kind: list[int]
    exact: bool

    @property
    def counts(self) -> list[int]:
        return [len(devices) for devices in self.members]

    @property
    def states(self) -> float:
        """How many combinations of numbers of used devices there are."""
        return float(np.prod([count + 1.0 for count in self.counts]))

    def representatives(self) -> list[int]:
        """One device index per kind."""
        first = {kind: devices[0] for devices, kind in zip(reversed(self.members), reversed(self.kind), strict=True)}
        return [first[kind] for kind in sorted(first)]


def group(problem: Problem, pinned: dict[int, object], *, merge: bool, single: bool = False) -> Classes:
    """`pinned` marks devices that must stay alone; `single` makes each device its own class (fixed orders)."""
    links = _link_table(problem)
    members: list[list[int]] = []
    kinds: dict[tuple, int] = {}
    kind: list[int] = []
    for d, device in enumerate(problem.devices):
        key = (device.type, device.memory_bytes, d if d in pinned else -1)
        kinds.setdefault(key, len(kinds))
        for c, devices in enumerate(members):
            if not single and kind[c] == kinds[key] and (merge or _interchangeable(links, devices, d)):
                devices.append(d)
                break
        else:
            members.append([d])
            kind.append(kinds[key])
    return Classes(members, kind, exact=not merge)


def _link_table(problem: Problem) -> np.ndarray:
    """[D, D] numbers that are equal exactly when the links are."""
    names = [device.name for device in problem.devices]
    index = {name: i for i, name in enumerate(names)}
    codes = {problem.links.default: 0}
    table = np.zeros((len(names),) * 2, dtype=np.int64)
    for (sender, receiver), link in problem.links.pairs.items():
        table[index[sender], index[receiver]] = codes.setdefault(link, len(codes))
    np.fill_diagonal(table, -1)
    return table


def _interchangeable(links: np.ndarray, devices: list[int], d: int) -> bool:
    """Exchanging d with each member leaves the link table unchanged."""
    for e in devices:
        order = np.arange(len(links))
        order[d], order[e] = e, d
        if not np.array_equal(links[np.ix_(order, order)], links):
            return False
    return True


def class_links(table: np.ndarray, classes: Classes) -> np.ndarray:
    """[..., C, C]: the least entry of table[..., D, D] between different members of two classes."""
    count = len(classes.members)
    found = np.full((*table.shape[:-2], count, count), np.inf)
    blank = table.copy()
    diagonal = np.arange(table.shape[-1])
    blank[..., diagonal, diagonal] = np.inf
    for c, senders in enumerate(classes.members):
        for e, receivers in enumerate(classes.members):
            found[..., c, e] = blank[..., senders, :][..., receivers].min(axis=(-2, -1))
    return found
