"""From a profile to a latency model: non-negative least squares on relative errors, one fit a part.

A fit is a list of weights for the columns of `features`; with weights and columns non-negative and columns that never
fall, so is every prediction. Leave-one-out errors say how far a fit is off where it was not told.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, Le

from ds_llmpq.cluster.devices import DeviceType
from ds_llmpq.cost import features
from ds_llmpq.cost.latency import RooflineCosts
from ds_llmpq.cost.profile import (
    ALONE,
    CONTENTION,
    TOGETHER,
    Measured,
    Part,
    Phase,
    Profile,
    Setup,
    Width,
    rename_setup,
)
from ds_llmpq.files import read_json
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.quant.kernels.registry import find_kernel
from ds_llmpq.validation import Amount, Count, Many, Name, Positive, Some, one_of, validate

SCHEMA = 1
FEWEST_POINTS = 3
_NEUTRAL = DeviceType("reference", "cpu", 0, 1e10, {"float32": 1e11, "bfloat16": 1e11, "float16": 1e11}, 0.0,
                      (1, 2, 3, 4, 8, 16), None, "measured: a unit for features, no device")  # fmt: skip


@dataclass(frozen=True)
class Residual:
    """A point, its measured time, and what a fit without it predicts."""

    phase: Phase
    bits: Width
    batch: Positive
    length_tokens: Count
    seconds: Annotated[float, Gt(0), Le(1e12)]
    left_out_seconds: Amount
    spread: Amount

    @property
    def error(self) -> float:
        return self.left_out_seconds / self.seconds - 1.0


@dataclass(frozen=True)
class Fit:
    """Weights of one part on one device type, the range they come from, and the leave-one-out residuals."""

    device_type: Name
    part: Part
    phase: Phase
    bits: Width
    weights: Some[Amount]
    batch_range: tuple[Positive, Positive]
    length_range: tuple[Count, Count]
    residuals: Some[Residual]

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.device_type, self.part, self.phase, self.bits

    @property
    def mean_error(self) -> float:
        return sum(abs(entry.error) for entry in self.residuals) / len(self.residuals)

    @property
    def worst_error(self) -> float:
        return max(abs(entry.error) for entry in self.residuals)

    def covers(self, batch: int, length: float) -> bool:
        """Within the profiled range; outside it is extrapolation."""
        return (
            self.batch_range[0] <= batch <= self.batch_range[1]
            and self.length_range[0] <= length <= self.length_range[1]
        )


@dataclass(frozen=True)
class LatencyModel:
    """All fits of a profile. `setup` is what it was measured with. `alone`: `Profile.alone_shares`, which only short
    profiles have; `contention`: `Profile.contentions`, seconds. A latency.json has none of both."""

    setup: Setup
    fits: Mapping[tuple[str, str, str, int], Fit]
    alone: Mapping[tuple[str, str], float] = field(default_factory=dict)
    contention: Mapping[str, float] = field(default_factory=dict)

    def get(self, device_type: str, part: str, phase: str, bits: int = 0) -> Fit | None:
        return self.fits.get((device_type, part, phase, bits))

    def find_error(self, device_type: str, phase: str) -> float | None:
        """How far off the times of layers are at points left out of the fit: the mean over the bit widths that were
        profiled; None where there are none."""
        errors = [fit.mean_error for fit in self.list_layers(device_type, phase)]
        return sum(errors) / len(errors) if errors else None

    def list_layers(self, device_type: str, phase: str) -> list[Fit]:
        own = (device_type, "layer", phase)
        return [fit for fit in self.fits.values() if fit.key[:3] == own]

    def write(self, path: Path) -> None:
        entries = [asdict(fit) for fit in self.fits.values()]
        record = {"schema": SCHEMA, "setup": asdict(self.setup), "fits": entries}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Record:
    """The file of a `LatencyModel`."""

    schema: one_of(SCHEMA)
    setup: Setup
    fits: Many[Fit]


def read_model(path: str | Path) -> LatencyModel:
    """A latency.json. `UserError`: unreadable, another schema, a negative or missing number."""
    remedy = "make one with `ds-llmpq profile`"
    where = f"latency model {path}"
    record = validate(_Record, rename_setup(read_json(path, "latency model", remedy), where), where, remedy)
    return LatencyModel(record.setup, {fit.key: fit for fit in record.fits})


def fit_profile(
    profile: Profile, shape: ModelShape, keep: Callable[[Measured], bool] = lambda point: True
) -> LatencyModel:
    """Fits every part with at least three points that `keep` lets through."""
    setup = profile.setup
    unit = unit_roofline(shape, setup)
    groups: dict[tuple[str, str, str, int], list[Measured]] = defaultdict(list)
    for entry in profile.measured():
        point = entry.point
        if point.part not in (ALONE, TOGETHER, CONTENTION) and keep(entry):
            groups[point.device_type, point.part, point.phase, point.bits].append(entry)
    fits = {}
    for key, points in groups.items():
        if len(points) >= FEWEST_POINTS:
            fits[key] = _fit_points(key, points, unit)
    return LatencyModel(setup, fits, profile.alone_shares(), profile.contentions())


def columns(roofline: RooflineCosts, part: str, phase: str, bits: int, batch: int, length: float) -> list[float]:
    if part == "layer":
        return features.layer_features(roofline, bits, phase, batch, length)
    return features.part_features(roofline, part, batch, round(length))


def unit_roofline(shape: ModelShape, setup: Setup) -> RooflineCosts:
    """The roofline whose parts are the columns of all fits of a profile; no device's rates enter a fit."""
    return RooflineCosts(_NEUTRAL, shape, setup.dtype, setup.groups, find_kernel(setup.kernel), setup.lm_head_bits)


def _fit_points(key: tuple[str, str, str, int], points: list[Measured], unit: RooflineCosts) -> Fit:
    import numpy

    _, part, phase, bits = key
    table = numpy.array([columns(unit, part, phase, bits, p.point.batch, p.point.length_tokens) for p in points])
    seconds = numpy.array([max(p.seconds, 1e-9) for p in points])
    weights = _solve(table, seconds)
    everyone = numpy.arange(len(points))
    residuals = []
    for index, entry in enumerate(points):
        others = everyone != index
        predicted = float(table[index] @ _solve(table[others], seconds[others]))
        point = entry.point
        residuals.append(
            Residual(phase, bits, point.batch, point.length_tokens, entry.seconds, predicted, entry.spread)
        )  # fmt: skip
    batches, lengths = ([getattr(p.point, name) for p in points] for name in ("batch", "length_tokens"))
    ranges = (min(batches), max(batches)), (min(lengths), max(lengths))
    return Fit(*key, tuple(float(weight) for weight in weights), *ranges, tuple(residuals))


def _solve(table: Any, seconds: Any) -> Any:
    """Non-negative weights that minimise the sum of squared relative errors, with a faint pull towards few columns."""
    import numpy
    from scipy.optimize import nnls

    rows = table / seconds[:, None]
    scale = numpy.maximum(numpy.abs(rows).max(axis=0), 1e-300)
    ridge = 1e-3 * numpy.eye(table.shape[1])
    system = numpy.vstack([rows / scale, ridge])
    wanted = numpy.concatenate([numpy.ones(len(seconds)), numpy.zeros(table.shape[1])])
    return nnls(system, wanted)[0] / scale
