"""Decisions the user has made already: the order of devices, the layers of a device, the width of a layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ds_llmpq.errors import UserError
from ds_llmpq.plan import Assignment, reading
from ds_llmpq.planner.problem import MicroBatchCandidates, Problem


@dataclass(frozen=True)
class Pins:
    """`order`: only these devices, in this order (some may be left out). `layers`: device -> [first, last), exactly.
    `bits`: layer -> width. `micro_batch`: phase ("prefill", "decode") -> size."""

    order: tuple[str, ...] = ()
    layers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    bits: Mapping[int, int] = field(default_factory=dict)
    micro_batch: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def from_json(cls, obj: Any, problem: Problem) -> "Pins":
        """Read and check an object with any of the four fields as keys; null means no pins."""
        if obj is None:
            return cls()
        if isinstance(obj, cls):
            obj = {
                "order": list(obj.order),
                "layers": {name: list(span) for name, span in obj.layers.items()},
                "bits": {str(layer): width for layer, width in obj.bits.items()},
                "micro_batch": dict(obj.micro_batch),
            }
        reading.keys(obj, "pins", (), ("order", "layers", "bits", "micro_batch"))
        names = [device.name for device in problem.devices]
        order = tuple(
            reading.text(name, f"pins.order[{i}]", names)
            for i, name in enumerate(reading.items(obj.get("order") or [], "pins.order", empty=True))
        )
        if len(set(order)) < len(order):
            raise UserError(f"pins.order is {reading.shown(list(order))}, but must name each device once.")
        spans = reading.mapping(obj.get("layers") or {}, "pins.layers")
        layers = {name: _span(span, f"pins.layers.{name}", problem) for name, span in spans.items()}
        for name in layers:
            if name not in (order or names):
                raise UserError(f"pins.layers names {name!r}, which is not among the devices that may be used.")
        widths = reading.mapping(obj.get("bits") or {}, "pins.bits")
        bits = {_layer(layer, problem): width for layer, width in widths.items()}
        for layer, width in bits.items():
            if isinstance(width, bool) or not isinstance(width, int) or width not in problem.bits:
                raise UserError(f"pins.bits.{layer} is {reading.shown(width)}, but must be one of {problem.bits}.")
        sizes = dict(reading.mapping(obj.get("micro_batch") or {}, "pins.micro_batch"))
        reading.keys(sizes, "pins.micro_batch", (), ("prefill", "decode"))
        for phase, size in sizes.items():
            known = getattr(problem.micro_batches, phase)
            if isinstance(size, bool) or not isinstance(size, int) or size not in known:
                raise UserError(f"pins.micro_batch.{phase} is {reading.shown(size)}, but must be one of {known}.")
        return cls(order, layers, bits, sizes)

    def apply(self, problem: Problem) -> Problem:
        """The problem with the order and the micro-batch pins built in."""
        if self.order:
            devices = {device.name: device for device in problem.devices}
            pairs = {ends: link for ends, link in problem.links.pairs.items() if set(ends) <= set(self.order)}
            problem = replace(
                problem,
                devices=tuple(devices[name] for name in self.order),
                device_order="fixed",
                links=replace(problem.links, pairs=pairs),
            )
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
        """[L, B] bool: the widths a layer may take."""
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

    def respected(self, assignment: Assignment) -> bool:
        """True if the assignment keeps every pin (the order and sizes are the problem's own business)."""
        spans = {stage.device: (stage.first, stage.last) for stage in assignment.stages}
        widths = [width for stage in assignment.stages for width in stage.bits]
        return all(spans.get(name) == span for name, span in self.layers.items()) and all(
            widths[layer] == width for layer, width in self.bits.items()
        )


def _span(value: Any, path: str, problem: Problem) -> tuple[int, int]:
    first, last = (reading.integer(v, path, low=0) for v in reading.items(value, path, length=2))
    if not first < last <= problem.layers:
        raise UserError(f"{path} is [{first}, {last}], but must be [first, last) within {problem.layers} layers.")
    return first, last


def _layer(value: Any, problem: Problem) -> int:
    try:
        layer = int(value)
    except (TypeError, ValueError):
        layer = -1
    if not 0 <= layer < problem.layers:
        raise UserError(f"pins.bits has the layer {reading.shown(value)}, but layers are 0 to {problem.layers - 1}.")
    return layer
