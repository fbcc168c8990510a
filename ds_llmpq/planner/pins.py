"""Decisions the user has made already: the order of devices, the layers of a device, the bit width of a layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ds_llmpq.errors import UserError, quote
from ds_llmpq.plan import Assignment
from ds_llmpq.planner.problem import MicroBatchCandidates, Problem
from ds_llmpq.validation import Count, LayerBits, Many, Name, Positive, Table, TableByNumber, one_of, validate


@dataclass(frozen=True)
class Pins:
    """`order`: only these devices, in this order (some may be left out). `layers`: device -> [first, last), exactly.
    `bits`: layer -> width. `micro_batch`: phase ("prefill", "decode") -> size."""

    order: Many[Name] = ()
    layers: Table[tuple[Count, Count]] = field(default_factory=dict)
    bits: TableByNumber[LayerBits] = field(default_factory=dict)
    micro_batch: dict[one_of("prefill", "decode"), Positive] = field(default_factory=dict)

    @classmethod
    def from_json(cls, obj: Any, problem: Problem) -> "Pins":
        """Read and check an object with any of the four fields as keys; null means no pins."""
        obj = vars(obj) if isinstance(obj, cls) else obj
        if isinstance(obj, Mapping):
            obj = {name: entry for name, entry in obj.items() if entry is not None}
        pins = cls() if obj is None else validate(cls, obj, "pins", "correct it")
        pins._check(problem)
        return pins

    def _check(self, problem: Problem) -> None:
        names = [device.name for device in problem.devices]
        for i, name in enumerate(self.order):
            if name not in names:
                raise UserError(f"pins.order[{i}] is {name!r}, but must be one of {', '.join(names)}; correct it.")
        if len(set(self.order)) < len(self.order):
            raise UserError(f"pins.order is {quote(list(self.order))}, but must name each device once; correct it.")
        for name, (first, last) in self.layers.items():
            if name not in (self.order or names):
                raise UserError(
                    f"pins.layers has {name!r}, which is not among the devices that may be used; remove it."
                )
            if not first < last <= problem.layers:
                bound = f"[first, last) within {problem.layers} layers"
                raise UserError(f"pins.layers.{name} is [{first}, {last}], but must be {bound}; correct it.")
        for layer, width in self.bits.items():
            if layer >= problem.layers:
                last = problem.layers - 1
                raise UserError(f"pins.bits has the layer {layer}, but layers are 0 to {last}; remove it.")
            _check_choice(width, problem.bits, f"pins.bits.{layer}")
        for phase, size in self.micro_batch.items():
            _check_choice(size, getattr(problem.micro_batches, phase), f"pins.micro_batch.{phase}")

    def apply(self, problem: Problem) -> Problem:
        """The problem with the order and the micro-batch pins built in."""
        if self.order:
            problem = replace(problem.with_devices(self.order), device_order="fixed")
        sizes = problem.micro_batches
        kept = {
            phase: (self.micro_batch[phase],) if phase in self.micro_batch else getattr(sizes, phase)
            for phase in ("prefill", "decode")
        }
        return replace(problem, micro_batches=MicroBatchCandidates(**kept))

    def device_indices(self, problem: Problem) -> dict[int, tuple[int, int]]:
        """Pinned devices by index."""
        return {d: self.layers[device.name] for d, device in enumerate(problem.devices) if device.name in self.layers}

    def widths(self, problem: Problem) -> np.ndarray:
        """[L, B] bool: the bit widths a layer may take."""
        allowed = np.ones((problem.layers, len(problem.bits)), dtype=bool)
        for layer, width in self.bits.items():
            allowed[layer] = [b == width for b in problem.bits]
        return allowed

    def intervals(self, problem: Problem, device: int) -> np.ndarray | None:
        """[L, L] bool at (a, k - 1): the stages this device may hold; None when anything goes."""
        if not self.layers:
            return None
        first = np.arange(problem.layers)[:, None]
        last = first + np.arange(1, problem.layers + 1)[None, :]
        own = self.layers.get(problem.devices[device].name)
        if own is not None:
            return (first == own[0]) & (last == own[1])
        free = np.ones((problem.layers, problem.layers), dtype=bool)
        for start, stop in self.layers.values():
            free &= (last <= start) | (first >= stop)
        return free

    def placements(self, problem: Problem) -> np.ndarray:
        """[L, D, B] bool: what the mixed-integer model may choose."""
        allowed = np.repeat(self.widths(problem)[:, None, :], len(problem.devices), axis=1)
        for d, (start, stop) in self.device_indices(problem).items():
            allowed[:start, d] = allowed[stop:, d] = False
            others = [e for e in range(len(problem.devices)) if e != d]
            allowed[start:stop, others] = False
        return allowed

    def respects(self, assignment: Assignment) -> bool:
        """True if the assignment keeps every pin (the order and sizes are the problem's own business)."""
        spans = {stage.device: (stage.first, stage.last) for stage in assignment.stages}
        widths = [width for stage in assignment.stages for width in stage.bits]
        return all(spans.get(name) == span for name, span in self.layers.items()) and all(
            widths[layer] == width for layer, width in self.bits.items()
        )


def _check_choice(value: int, choices: tuple[int, ...], path: str) -> None:
    if value not in choices:
        raise UserError(f"{path} is {value}, but must be one of {', '.join(map(str, choices))}; correct it.")
