"""Fitted times where a profile has them, the roofline's where it has not; every number says which."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ds_llmpq.cluster.devices import DeviceType
from ds_llmpq.cost.fit import LatencyModel, columns, fit_profile, read_model, unit_roofline
from ds_llmpq.cost.latency import PassOverhead, RooflineCosts
from ds_llmpq.cost.profile import (
    DRAW,
    NEW_SIZE,
    NEW_SIZE_MIXED,
    TRIAL_PARTS,
    Setup,
    check_setup,
    read_profile,
)
from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.quant.packing import UNQUANTIZED_BITS
from ds_llmpq.wording import format_percent


@dataclass
class FittedCosts:
    """`LayerCosts` of one device type. `drawn_share`: share of the rows whose tokens are drawn, where the others take
    the likeliest."""

    device_type: DeviceType
    model: LatencyModel
    roofline: RooflineCosts
    drawn_share: float = 0.0

    def __post_init__(self) -> None:
        self._unit = unit_roofline(self.roofline.shape, self.model.setup)
        # what was asked for, but not profiled
        self._missed: dict[str, set[int]] = {}  # bit widths by phase
        self._outside: dict[str, set[tuple[int, float]]] = {}  # sequences and tokens by phase

    @property
    def notes(self) -> list[str]:
        """What was extrapolated or not profiled, so far: two lines for each phase at most."""
        name = self.device_type.name
        found = [
            f"{name} was not profiled at {', '.join(map(str, sorted(bits)))} bits in {phase}: roofline times"
            for phase, bits in self._missed.items()
        ]
        for phase, sizes in self._outside.items():
            batches, lengths = ([size[i] for size in sizes] for i in (0, 1))
            found.append(
                f"{name} {phase}: times of {_span(batches)} sequences of {_span(lengths)} tokens are extrapolated, "
                "since they lie outside the profiled sizes"
            )
        return found

    @property
    def provenance(self) -> str:
        """`fitted` with its leave-one-out error, or `roofline` for a type the profile does not know."""
        errors = {phase: error for phase in ("prefill", "decode") if (error := self.time_error(phase)) is not None}
        if not errors:
            return f"roofline (the profile has no {self.device_type.name})"
        means = " and ".join(f"{format_percent(error, '.1')} in {phase}" for phase, error in errors.items())
        fits = [fit for phase in errors for fit in self.model.list_layers(self.device_type.name, phase)]
        worst = format_percent(max(fit.worst_error for fit in fits), ".1")
        missed = sorted(set().union(*self._missed.values()))
        rest = f"; {', '.join(map(str, missed))} bits roofline" if missed else ""
        return f"fitted (left-out points off by {means} on average, {worst} at worst{rest})"

    def prefill_seconds(self, bits: int, batch: int, tokens: int) -> float | None:
        if bits not in self.device_type.bits:
            return None
        fitted = self._fitted("layer", "prefill", bits, batch, tokens)
        return self.roofline.prefill_seconds(bits, batch, tokens) if fitted is None else fitted

    def decode_seconds(self, bits: int, batch: int, past: float) -> float | None:
        if bits not in self.device_type.bits:
            return None
        fitted = self._fitted("layer", "decode", bits, batch, past)
        return self.roofline.decode_seconds(bits, batch, past) if fitted is None else fitted

    def embed_seconds(self, batch: int, tokens: int) -> float:
        fitted = self._fitted("embed", "prefill" if tokens > 1 else "decode", 0, batch, tokens)
        return self.roofline.embed_seconds(batch, tokens) if fitted is None else fitted

    def head_seconds(self, batch: int) -> float:
        fitted = self._fitted("head", "decode", 0, batch, 1)
        return self.roofline.head_seconds(batch) if fitted is None else fitted

    def pass_overhead(self, phase: str, batch: int, tokens: int) -> PassOverhead:
        first, middle, last = (self._fitted(part, phase, 0, batch, tokens) or 0.0 for part in TRIAL_PARTS)
        last += batch * self.drawn_share * self._median(DRAW, "decode")
        return PassOverhead(first, middle, last, self.model.contention.get(self.device_type.name, 0.0))

    def first_pass_seconds(self, widths: Iterable[int]) -> float:
        """Unquantized and quantized layers each have kernels made for them, unless a stage is one graph."""
        mixed = len({width < UNQUANTIZED_BITS for width in widths}) > 1 and not self.roofline.kernel.whole_stage
        return (mixed and self._median(NEW_SIZE_MIXED, "prefill")) or self._median(NEW_SIZE, "prefill")

    def alone_share(self, phase: str) -> float:
        return self.model.alone.get((self.device_type.name, phase), 1.0)

    def time_error(self, phase: str) -> float | None:
        return self.model.find_error(self.device_type.name, phase)

    def _median(self, part: str, phase: str) -> float:
        """Of what was measured; 0 where nothing was."""
        fit = self.model.get(self.device_type.name, part, phase)
        return median(entry.seconds for entry in fit.residuals) if fit else 0.0

    def _fitted(self, part: str, phase: str, bits: int, batch: int, length: float) -> float | None:
        fit = self.model.get(self.device_type.name, part, phase, bits)
        if fit is None:
            if part == "layer":
                self._missed.setdefault(phase, set()).add(bits)
            return None
        if part == "layer" and not fit.covers(batch, length):
            self._outside.setdefault(phase, set()).add((batch, length))
        values = columns(self._unit, part, phase, bits, batch, length)
        return sum(weight * value for weight, value in zip(fit.weights, values, strict=True))


def _span(values: Iterable[float]) -> str:
    first, last = min(values), max(values)
    return f"{first:g}" if first == last else f"{first:g} to {last:g}"


def load_model(path: str | Path, shape: ModelShape, setup: Setup, force: bool = False) -> LatencyModel:
    """The latency model of a profile's folder, of its profile.csv (fitted anew) or of its latency.json.

    `UserError`: it was measured with another `setup`, unless `force`; the layer's shape must agree in any case.
    """
    file = _profile_file(path)
    table = read_profile(file) if file.suffix == ".csv" else None
    model = None if table else read_model(file)
    found = table.setup if table else model.setup
    if found.layer != setup.layer:
        raise UserError(f"profile {file} is for layers of another shape than this model's; profile this model")
    if not force:
        remedy = "profile again, or use it all the same with planner.profile_force=true"
        check_setup(found, setup, f"profile {file}", remedy)
    return fit_profile(table, shape) if table else _with_all_weights(model, shape, file)


def _with_all_weights(model: LatencyModel, shape: ModelShape, file: Path) -> LatencyModel:
    """`UserError` unless each fit weighs as many columns as this version has."""
    unit = unit_roofline(shape, model.setup)
    for fit in model.fits.values():
        wanted = len(columns(unit, fit.part, fit.phase, fit.bits, 1, 1))
        if len(fit.weights) != wanted:
            raise UserError(
                f"{file} weighs {fit.part} with {len(fit.weights)} numbers, but this version has {wanted}; make one "
                "with `ds-llmpq profile`"
            )
    return model


def profiled_kernel(path: str | Path) -> str:
    """The kernel that a profile was measured with. `UserError`: there is no such profile."""
    file = _profile_file(path)
    return (read_profile(file) if file.suffix == ".csv" else read_model(file)).setup.kernel


def _profile_file(path: str | Path) -> Path:
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / ("profile.csv" if (file / "profile.csv").is_file() else "latency.json")
    if not file.is_file():
        raise UserError(f"planner.profile={path} is neither a profile nor a folder with one; run `ds-llmpq profile`")
    return file
