"""Close a box exactly: every plan in it that could beat the target, depth first, pruned by the costs to go.

Used where splitting the box no longer helps: what is left is the gap between whole-number and priced bit widths,
between the two sides of a decode round, or between a hard limit and its price. Works for small or nearly closed boxes;
a step limit tells when it is not.
"""

import time
from dataclasses import dataclass, field

import numpy as np

from ds_llmpq.plan import Assignment, StageAssignment
from ds_llmpq.planner.search.node import Node, Target
from ds_llmpq.planner.search.relaxation import Relaxation
from ds_llmpq.planner.search.stage_bounds import NEVER

OPTION_LIMIT = 4000


class TooMany(Exception):
    """The box holds more candidates than the limit allows."""


@dataclass
class Enumeration:
    """Depth-first enumeration of one node's box; `run` is true when nothing below the target was left out.

    Plans go to the target's incumbent. `steps`: what is left of the step limit.
    """

    relaxed: Relaxation
    node: Node
    target: Target
    deadline: float
    steps: int
    options: dict[tuple[int, int, int], list[tuple[float, float, float, tuple[int, ...]]]] = field(default_factory=dict)

    def run(self) -> bool:
        node = self.node
        self.pair = self.relaxed.pairs[node.pair]
        self.stage, self.link, self.final = self.relaxed.tables(node)
        self.after = self.relaxed.space.costs_to_go(self.stage, self.link, self.final).after
        self.constant = self.relaxed.constant(node)
        self.ring = self.relaxed.ring_weight(node)
        try:
            self._extend(0, 0, -1, self.constant, [])
        except TooMany:
            return False
        return True

    def _hopeless(self, value: float) -> bool:
        units = self.relaxed.in_objective_units(value - 1e-9 * abs(value), self.node.duals.theta)
        return units >= self.target.value

    def _extend(self, first: int, state: int, last: int, cost: float, placed: list) -> None:
        """Try all next stages, the most promising first."""
        layers = self.stage.shape[1]
        if first == layers:
            self._offer(placed)
            return
        tried = []
        for c in np.flatnonzero(~self.relaxed.space.full[state]):
            arrive = cost + (self.link[last, c] if last >= 0 else 0.0)
            reach = min(layers - first, self.stage.shape[2])
            values = arrive + self.stage[c, first, :reach] + self.after[first + 1 : first + 1 + reach, state, c]
            tried += [(values[k], int(c), k + 1, arrive) for k in range(reach) if values[k] < NEVER]
        for value, c, k, arrive in sorted(tried):
            if self._hopeless(value):
                break
            onward = self.after[first + k, state, c]
            whole = self.final[c] if first == 0 and k == layers else 0.0  # a single stage has no way back
            for prefill, decode, loss, bits in self._stage_options(self.relaxed.classes.kind[c], first, k):
                total = arrive + prefill + self.ring * decode + self.node.duals.theta * loss
                total += self.node.duals.prices[c] - whole
                self._count()
                if not self._hopeless(total + onward):
                    used = int(self.relaxed.space.next[state, c])
                    self._extend(first + k, used, c, total, [*placed, (c, first, first + k, bits)])

    def _count(self, steps: int = 1) -> None:
        self.steps -= steps
        if self.steps < 0 or time.monotonic() > self.deadline:
            raise TooMany

    def _offer(self, placed: list) -> None:
        problem, arrays = self.relaxed.problem, self.pair.arrays
        free = [list(devices) for devices in self.relaxed.classes.members]
        stages = tuple(
            StageAssignment(problem.devices[free[c].pop(0)].name, first, last, tuple(problem.bits[b] for b in bits))
            for c, first, last, bits in placed
        )
        self.target.best.offer(Assignment(stages, arrays.prefill_micro_batch, arrays.decode_micro_batch))

    def _stage_options(self, q: int, first: int, k: int) -> list[tuple[float, float, float, tuple[int, ...]]]:
        """(P, D, loss, bits) of the undominated choices of bit widths within the box."""
        key = (q, first, k)
        if key not in self.options:
            stages, box = self.pair.stages, self.node.box
            at_start, at_end = first == 0, first + k == stages.layers
            limits = stages.limits(q, box, at_start, at_end)
            limits = limits + 1e-9 * np.abs(limits)
            found: dict[tuple[int, ...], tuple] = {(0,) * stages.widths: (0.0, 0.0, 0.0, 0.0, ())}
            for layer in range(first, first + k):
                found = self._with_layer(found, q, layer, limits)
            ends = [int(at_start) * stages.embed[p, q] + int(at_end) * stages.head[p, q] for p in (0, 1)]
            options = [(p + ends[0], d + ends[1], loss, bits) for p, d, _, loss, bits in found.values()]
            self.options[key] = _drop_dominated(options)
        return self.options[key]

    def _with_layer(self, found: dict, q: int, layer: int, limits: np.ndarray) -> dict:
        """All choices with one more layer; among equal compositions of like layers the least loss is enough."""
        stages, grown = self.pair.stages, {}
        alike = stages.costs[q].same_bytes
        for key, (p, d, m, loss, bits) in found.items():
            for b in np.flatnonzero(stages.usable[q] & stages.allowed[layer]):
                use = (p + stages.prefill[q, b], d + stages.decode[q, b], m + stages.bytes[layer, b])
                if any(u > limit for u, limit in zip(use, limits, strict=True)):
                    continue
                name = (*key[:b], key[b] + 1, *key[b + 1 :]) if alike else (*bits, int(b))
                total = loss + stages.arrays.sensitivity[layer, b]
                if name not in grown or total < grown[name][3]:
                    grown[name] = (*use, total, (*bits, int(b)))
            if len(grown) > OPTION_LIMIT:
                raise TooMany
        self._count(len(grown))
        return grown


def _drop_dominated(options: list[tuple]) -> list[tuple]:
    """Without those that another equals or beats in P, D and loss."""
    if not options:
        return []
    values = np.array([option[:3] for option in options])
    order = np.lexsort(values.T[::-1])
    kept: list[int] = []
    for i in order:
        if not kept or not (values[kept] <= values[i]).all(axis=1).any():
            kept.append(int(i))
    return [options[i] for i in kept]
