"""Inverse planning: the fewest, or the cheapest, devices of a cluster on which the batch ends by a deadline.

Choices of devices are taken from a queue, the least possible cost first. A choice enters it with the time that all
devices together need at least, comes back with a bound of its own by arithmetic, then by linear programs, and only the
first of those is planned for. It ends when no choice can cost less than the best plan, up to the solver's gap.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ds_llmpq.errors import InfeasibleError, UserError
from ds_llmpq.plan import Plan
from ds_llmpq.planner.feasibility import memory_feasible, pairs
from ds_llmpq.planner.pins import Pins
from ds_llmpq.planner.problem import Objective, Problem
from ds_llmpq.planner.search.device_classes import group
from ds_llmpq.planner.search.fractional import first_bounds, simple_bound
from ds_llmpq.planner.solve import solve
from ds_llmpq.wording import format_number, pluralize

Prices = Callable[[Iterable[str]], float | None]  # names of devices -> an hour of them; None: there are no prices
Key = tuple[float, float]  # what is minimised: money or devices, then seconds
SHARES = 4  # of the time limit, for the plans that are made
UNKNOWN, ARITHMETIC, LINEAR = range(3)  # how well the time on a choice of devices is bounded


def solve_by_deadline(
    problem: Problem,
    seconds: float,
    sum_prices: Prices | None = None,
    *,
    plan_for: Callable[..., Plan] = solve,
    time_limit_seconds: float = 60.0,
    requests: int = 0,
    **options: Any,
) -> Plan:
    """The plan on the cheapest devices whose predicted time for the whole batch is at most `seconds`.

    `requests`: how many there are to serve, if they are more than the planned sequences. As slots are refilled, they
    are taken to need time in proportion.

    Cheapest: least money for the batch where there are prices, else fewest devices; of equals the fastest. On each
    choice of devices the plan is that of the problem's own mode; where theta makes it too slow, the fastest within the
    limit of the loss or, without a limit, the least lossy in time.
    `plan_for`: called as `planner.solve` is, with `options`.
    Raises `InfeasibleError` with the fastest time found and what none undercuts.
    """
    if not 0 < seconds < math.inf:
        raise UserError(f"planner.deadline_seconds is {seconds}, but must be above 0.")
    pins = Pins.from_json(options.get("pins"), problem)
    if pins.order or pins.layers or options.get("baseline"):
        raise UserError(
            "planner.deadline_seconds chooses the devices; leave planner.baseline and the pins order and layers out."
        )
    ends = time.monotonic() + time_limit_seconds
    batches = max(1.0, requests / problem.workload.sequences)
    share = time_limit_seconds / SHARES
    return _DeviceSearch(problem, seconds / batches, batches, sum_prices, pins, ends, share, plan_for, options).run()


@dataclass
class _DeviceSearch:
    problem: Problem
    seconds: float  # for one planned batch
    batches: float  # how many of them there are to serve
    sum_prices: Prices | None
    pins: Pins
    ends: float
    share: float  # seconds that planning for one choice may take
    plan_for: Callable[..., Plan]
    options: dict[str, Any]
    best: Plan | None = None
    key: Key = (math.inf, math.inf)
    complete: bool = True  # no choice was left out for want of time

    def run(self) -> Plan:
        names = [device.name for device in self.problem.devices]
        whole = self._plan(names)
        if self.best is None:
            raise self._too_late(whole)
        everything = self._list_used(self.best), self.best.predicted.latency_seconds, self.key[0]
        self._search(self._bound(self.problem, LINEAR))
        first, *rest = self.best.explanation
        return replace(self.best, explanation=(first, self._explain(*everything), *rest))

    def _search(self, floor: float) -> None:
        """Looks for better choices; `floor`: seconds that even all devices need."""
        ticket = itertools.count()
        choices = self._choices()
        queue: list[tuple[Key, int, int, list[str]]] = []

        def enter(key: Key, step: int, names: list[str]) -> None:
            if key < self.key:
                heapq.heappush(queue, (key, next(ticket), step, names))

        upcoming = next(choices, None)
        while queue or upcoming:
            if time.monotonic() > self.ends:
                self.complete = False
                return
            # choices come by rising price, so none behind this one has a lower floor
            while upcoming and (not queue or self._rate(upcoming, floor) <= queue[0][0]):
                key = self._rate(upcoming, floor)
                if key >= self.key:
                    upcoming = None
                    break
                enter(key, UNKNOWN, upcoming)
                upcoming = next(choices, None)
            if not queue:
                break
            key, _, step, names = heapq.heappop(queue)
            if key >= self.key:
                break
            if step == LINEAR:
                if len(names) < len(self.problem.devices):  # else planned for already
                    self._plan(names)
                continue
            bound = max(key[1], self._bound(self.problem.with_devices(names), step + 1))
            if bound <= self.seconds:
                enter(self._rate(names, bound), step + 1, names)

    def _choices(self) -> Iterator[list[str]]:
        """All choices of devices but for interchangeable ones, by rising price."""
        classes = group(self.problem, {}, merge=False, single=self.problem.device_order == "fixed").members
        devices = self.problem.devices
        if self._price([devices[0].name]) is not None:
            classes = self._split_by_price(classes)
        start = (0,) * len(classes)
        queue = [(0.0, 0, start, 0)]
        while queue:
            _, _, counts, first = heapq.heappop(queue)
            names = [devices[d].name for d in sorted(d for c, n in zip(classes, counts, strict=True) for d in c[:n])]
            if names:
                yield names
            for c in range(first, len(classes)):
                if counts[c] < len(classes[c]):
                    more = (*counts[:c], counts[c] + 1, *counts[c + 1 :])
                    chosen = [devices[d].name for k, n in zip(classes, more, strict=True) for d in k[:n]]
                    heapq.heappush(queue, (self._rate(chosen, 3600.0)[0], len(chosen), more, c))

    def _split_by_price(self, classes: Sequence[list[int]]) -> list[list[int]]:
        """Classes of devices of one host and price."""
        found: dict[tuple[int, str, float], list[int]] = {}
        for c, members in enumerate(classes):
            for d in members:
                name = self.problem.devices[d].name
                found.setdefault((c, name.rpartition(":")[0], self._price([name]) or 0.0), []).append(d)
        return list(found.values())

    def _price(self, names: Iterable[str]) -> float | None:
        return self.sum_prices(names) if self.sum_prices else None

    def _rate(self, names: Sequence[str], seconds: float) -> Key:
        """What these devices cost if the batch takes so long."""
        price = self._price(names)
        return (float(len(names)) if price is None else price * seconds / 3600, seconds)

    def _bound(self, problem: Problem, step: int) -> float:
        """Seconds that no plan on these devices undercuts."""
        problem = self.pins.apply(replace(problem, objective=self._fastest()))
        if step == ARITHMETIC:
            if not memory_feasible(problem):
                return math.inf
            return min(simple_bound(problem, self.pins, pair) for pair in pairs(problem))
        return min(known.bound for known in first_bounds(problem, self.pins, self.ends).values())

    def _plan(self, names: Sequence[str]) -> Plan | None:
        """Plans for these devices; keeps the plan if it is the best one in time."""
        problem = self.problem.with_devices(names)
        own, asked = problem.objective, [problem.objective]
        if own.mode == "max_latency":
            asked = [replace(own, limit=min(own.limit, self.seconds))]
        else:
            asked.append(
                self._fastest() if own.mode == "max_quality_loss" else Objective("max_latency", limit=self.seconds)
            )
        plan, options = None, dict(self.options)
        for objective in asked:
            left = max(0.5, min(self.share, self.ends - time.monotonic()))
            try:
                plan = self.plan_for(replace(problem, objective=objective), time_limit_seconds=left, **options)
            except UserError as error:
                if len(names) == len(self.problem.devices) and objective.mode != "max_latency":
                    raise
                self.complete = self.complete and isinstance(error, InfeasibleError)
                continue
            options |= {"least_gain": 0.0} if "least_gain" in options else {}
            if plan.predicted.latency_seconds <= self.seconds:
                key = self._rate(self._list_used(plan), plan.predicted.latency_seconds)
                if key < self.key:
                    self.best, self.key = plan, key
                break
        return plan

    def _fastest(self) -> Objective:
        """Seconds alone, within the limit of the loss if there is one."""
        own = self.problem.objective
        return replace(own, theta=0.0) if own.mode == "max_quality_loss" else Objective("theta", theta=0.0)

    def _list_used(self, plan: Plan) -> list[str]:
        return [stage.device for stage in plan.stages]

    def _too_late(self, whole: Plan | None) -> InfeasibleError:
        if whole is None or self.problem.objective.mode != "max_quality_loss":
            fast = replace(self.problem, objective=self._fastest())
            whole = self.plan_for(fast, time_limit_seconds=max(2.0, self.ends - time.monotonic()), **self.options)
        found, bound = (self.batches * time for time in (whole.predicted.latency_seconds, whole.solver.bound or 0.0))
        return InfeasibleError(
            f"No devices of this cluster finish {self._what} within {self._deadline} s: the fastest plan "
            f"found takes {format_number(found, 4)} s and none less than {format_number(bound, 4)} s; raise "
            f"planner.deadline_seconds to {format_number(math.ceil(100 * found) / 100, 5)} or add devices."
        )

    @property
    def _deadline(self) -> str:
        return format_number(self.batches * self.seconds)

    @property
    def _what(self) -> str:
        sequences = self.problem.workload.sequences
        return "the batch" if self.batches == 1 else f"{round(self.batches * sequences):,} requests"

    def _explain(self, free_used: list[str], free_seconds: float, free_cost: float) -> str:
        """`free_...`: the plan that would be made without a deadline."""
        used, seconds = self._list_used(self.best), self.best.predicted.latency_seconds
        priced = self._price(used) is not None
        less = "cheaper" if priced else "fewer"
        proof = f"no {less} ones do" if self.complete else f"the time limit came before all {less} ones were tried"
        devices = pluralize(len(self.problem.devices), "device")
        text = f"Deadline {self._deadline} s for {self._what}: {len(used)} of {devices} will do, "
        text += f"in {format_number(self.batches * seconds, 4)} s{self._money(self.key[0])}; {proof}."
        if free_used != used:
            took = f"{format_number(self.batches * free_seconds, 4)} s{self._money(free_cost)}"
            text += f" Without a deadline the plan would take {len(free_used)}, and {took}."
        return text

    def _money(self, cost: float) -> str:
        return (
            f" for {format_number(self.batches * cost)}"
            if self._price([self.problem.devices[0].name]) is not None
            else ""
        )
