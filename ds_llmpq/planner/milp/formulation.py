"""The mixed-integer model of one micro-batch pair, for free or given device orders.

One binary z[i, d, b] a layer, device and bit width; u[i, d] = sum_b z[i, d, b] says who holds layer i.

- Free order: s[i, d] >= u[i, d] - u[i-1, d] and sum_i s[i, d] <= 1 make every device's layers contiguous; the order
  follows from the layers and need not be enumerated. y[d, e] >= s[i, e] + u[i-1, d] - 1 sees the neighbours.
- Chain: the given devices in this order, each used; prefix sums of u fall along the layers, links are constants.
  Windows (`allowed`) keep layers near a known solution, which makes the model small: the polish.

Times are scaled so that the objective is near 1,000: in seconds, default tolerances mis-rank plans.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from ds_llmpq.plan import Assignment, StageAssignment
from ds_llmpq.planner.arrays import PairArrays
from ds_llmpq.planner.milp.model import Model
from ds_llmpq.planner.objective import charge_head
from ds_llmpq.planner.problem import Objective, Problem


@dataclass
class Formulation:
    """A model with the meaning of its columns. objective in problem units = model objective / scale."""

    model: Model
    z: dict[tuple[int, int, int], int]  # (layer, device index, bit index) -> column
    scale: float
    arrays: PairArrays
    devices: list[int]
    chain: bool
    u: dict[tuple[int, int], list[tuple[int, float]]] = field(default_factory=dict)

    def decode(self, problem: Problem, x: np.ndarray) -> Assignment:
        """The assignment of a solution vector."""
        placed = [(-1, -1)] * problem.layers
        for (layer, device, width), column in self.z.items():
            if x[column] > 0.5:
                placed[layer] = (device, width)
        stages, first = [], 0
        for i in range(1, problem.layers + 1):
            if i == problem.layers or placed[i][0] != placed[first][0]:
                bits = tuple(problem.bits[width] for _, width in placed[first:i])
                stages.append(StageAssignment(problem.devices[placed[first][0]].name, first, i, bits))
                first = i
        return Assignment(tuple(stages), self.arrays.prefill_micro_batch, self.arrays.decode_micro_batch)


def formulate(
    problem: Problem,
    arrays: PairArrays,
    *,
    chain: list[int] | None = None,
    allowed: np.ndarray | None = None,
    scale: float = 1000.0,
) -> Formulation:
    """`chain`: device indices in order, all used; None: any subset, in any order the problem permits.

    `allowed[i, d, b]` (bool, all devices of the problem) restricts z further. `scale` turns objective units into model
    units.
    """
    devices = chain if chain is not None else list(range(len(problem.devices)))
    usable = arrays.available[None, :, :] & np.ones((problem.layers, 1, 1), dtype=bool)
    if allowed is not None:
        usable = usable & allowed
    usable[0] &= np.isfinite(arrays.embed).all(axis=0)[:, None]
    usable[-1] &= np.isfinite(arrays.head).all(axis=0)[:, None]
    model = Model()
    z = {
        (i, d, b): model.column(high=1, integer=True)
        for i in range(problem.layers)
        for d in devices
        for b in range(len(problem.bits))
        if usable[i, d, b]
    }
    form = Formulation(model, z, scale, arrays, devices, chain is not None)
    for i in range(problem.layers):
        for d in devices:
            form.u[i, d] = [(z[i, d, b], 1.0) for b in range(len(problem.bits)) if (i, d, b) in z]
        model.row([term for d in devices for term in form.u[i, d]], 1, 1)
    if chain is not None or problem.device_order == "fixed":
        _monotone(form, problem.layers)
    links = _chain_links(form) if chain is not None else _free_links(form, problem.layers)
    _memory(form, problem.layers)
    _costs(form, problem.layers, problem.objective, links)
    return form


def _monotone(form: Formulation, layers: int) -> None:
    """Layers advance through the devices in the given order; in a chain every device gets at least one."""
    for j in range(len(form.devices) - 1):
        before, after = form.devices[: j + 1], form.devices[j + 1 :]
        for i in range(layers - 1):
            # Trivial where layer i cannot lie behind the boundary, or layer i + 1 not before it.
            if any(form.u[i, d] for d in after) and any(form.u[i + 1, d] for d in before):
                now = [term for d in before for term in form.u[i, d]]
                later = [(column, -1.0) for d in before for column, _ in form.u[i + 1, d]]
                form.model.row(now + later, low=0)
    if form.chain:
        for d in form.devices:
            form.model.row([term for i in range(layers) for term in form.u[i, d]], low=1)


def _chain_links(form: Formulation) -> list[list[tuple[int, float]]]:
    """Per phase the links in use: here constants, carried by columns fixed at one."""
    ring = [*form.devices, form.devices[0]]
    used = []
    for phase in range(2):
        entries = []
        for j in range(len(form.devices)) if len(form.devices) > 1 else ():
            table = form.arrays.back if j == len(form.devices) - 1 else form.arrays.link
            entries.append((form.model.column(low=1, high=1), float(table[phase, ring[j], ring[j + 1]])))
        used.append(entries)
    return used


def _free_links(form: Formulation, layers: int) -> list[list[tuple[int, float]]]:
    """Contiguity by start indicators, and indicator columns of the links between neighbours."""
    model, devices = form.model, form.devices
    start = {}
    for d in devices:
        for i in range(layers):
            start[i, d] = model.column(high=1)
            before = [(column, -1.0) for column, _ in form.u[i - 1, d]] if i else []
            model.row([*form.u[i, d], *before, (start[i, d], -1.0)], high=0)
        model.row([(start[i, d], 1.0) for i in range(layers)], high=1)
    forward: list[list[tuple[int, float]]] = [[], []]
    for d in devices:
        for e in devices:
            if d == e:
                continue
            link, back = form.arrays.link[:, d, e], form.arrays.back[:, d, e]
            if link.any():
                y = model.column(high=1)
                for i in range(1, layers):
                    if form.u[i - 1, d] and form.u[i, e]:
                        model.row([(start[i, e], 1.0), *form.u[i - 1, d], (y, -1.0)], high=1)
                for phase in range(2):
                    forward[phase].append((y, float(link[phase])))
            if back.any() and form.u[layers - 1, d] and form.u[0, e]:
                r = model.column(high=1)
                model.row([*form.u[layers - 1, d], *form.u[0, e], (r, -1.0)], high=1)
                for phase in range(2):
                    forward[phase].append((r, float(back[phase])))
    return forward


def _memory(form: Formulation, layers: int) -> None:
    """Weights, KV, embedding and head within what the workspace leaves; the row is scaled to about one."""
    arrays = form.arrays
    for d in form.devices:
        capacity = arrays.capacity[d]
        if capacity < 0:
            for (_, device, _), column in form.z.items():
                if device == d:
                    form.model.high[column] = 0.0
            continue
        terms = [(c, float(arrays.layer_bytes[i, b])) for (i, e, b), c in form.z.items() if e == d]
        terms += [(c, arrays.embed_bytes) for c, _ in form.u[0, d]]
        terms += [(c, arrays.head_bytes) for c, _ in form.u[layers - 1, d]]
        saved = charge_head(arrays, False, True) - charge_head(arrays, True, True)  # by holding both ends
        if saved:
            both = form.model.column(high=1)
            for i in (0, layers - 1):
                form.model.row([(both, 1.0), *((c, -1.0) for c, _ in form.u[i, d])], high=0)
            terms.append((both, -saved))
        unit = max(capacity, *(abs(value) for _, value in terms), 1e-30) if terms else 1.0
        form.model.row([(c, value / unit) for c, value in terms], high=capacity / unit)


def _costs(form: Formulation, layers: int, objective: Objective, links) -> None:
    """P, D, the slowest resources, the decode round, and the mode's objective and bound."""
    model, arrays = form.model, form.arrays
    priced = objective.mode != "max_latency"
    time_unit = form.scale if priced else 1000.0 / (objective.limit or 1.0)
    loss_weight = (objective.theta if priced else 1.0) * form.scale
    for (i, _, b), column in form.z.items():
        model.cost[column] = loss_weight * arrays.sensitivity[i, b]
    totals: list[tuple[int, float]] = []
    steps = arrays.generated_tokens - 1
    for phase, table in enumerate((arrays.prefill, arrays.decode)):
        slowest, total = model.column(), []
        for d in form.devices:
            stage = [(c, float(table[d, b]) * time_unit) for (_, e, b), c in form.z.items() if e == d]
            stage += [(c, float(arrays.embed[phase, d]) * time_unit) for c, _ in form.u[0, d]]
            stage += [(c, float(arrays.head[phase, d]) * time_unit) for c, _ in form.u[layers - 1, d]]
            model.row([*stage, (slowest, -1.0)], high=0)
            total += stage
        for column, seconds in links[phase]:
            model.row([(column, seconds * time_unit), (slowest, -1.0)], high=0)
            total.append((column, seconds * time_unit))
        if phase == 0:
            totals += [*total, (slowest, arrays.prefill_rounds - 1)]
        else:
            decode = model.column()
            model.row([(slowest, steps * arrays.decode_rounds), (decode, -1.0)], high=0)
            model.row([*((c, value * steps) for c, value in total), (decode, -1.0)], high=0)
            totals.append((decode, 1.0))
    if priced:
        for column, value in totals:
            model.cost[column] += value
    else:
        model.row(totals, high=objective.limit * time_unit)
    if objective.mode == "max_quality_loss":
        unit = 1.0 / objective.limit if objective.limit > 0 else 1.0
        loss = [(c, float(arrays.sensitivity[i, b]) * unit) for (i, _, b), c in form.z.items()]
        model.row(loss, high=objective.limit * unit)


def typical_scale(problem: Problem, evaluate_reference: float) -> float:
    """The scale that brings an objective of this size to about 1,000."""
    return 1000.0 / evaluate_reference if evaluate_reference > 0 and math.isfinite(evaluate_reference) else 1000.0
