"""profile.csv: measured times of the parts of a model, and what they were measured with.

The first line is a comment that holds a JSON object (`Setup`); below it stands plain CSV, one row a point and round.
Rows are appended as they are measured, so an interrupted profile goes on where it stopped.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

from annotated_types import Ge, Le

from ds_llmpq.cluster.devices import BIT_WIDTHS, COMPUTE_DTYPES
from ds_llmpq.errors import UserError
from ds_llmpq.files import parse_json, read_csv, read_text
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.quant.config import ZEROS, QuantConfig, rename_former
from ds_llmpq.quant.kernels.base import Kernel
from ds_llmpq.quant.packing import PACKED_BITS, UNQUANTIZED_BITS, Groups, make_groups
from ds_llmpq.validation import (
    Amount,
    Count,
    Label,
    Name,
    Plain,
    Positive,
    Seconds,
    Table,
    one_of,
    validate,
    validate_cells,
)

SCHEMA = 1
TRIAL_PARTS = ("first", "middle", "last")  # measured by passes of a trial pipeline
NEW_SIZE = "new_size"  # what the first pass of a number of tokens costs beyond the next ones: kernels are made for it
NEW_SIZE_MIXED = "new_size_mixed"  # for unquantized and for quantized layers
CONTENTION = "contention"  # what a pass takes beyond its work while other stages work on the same host
ALONE, TOGETHER = "alone", "together"  # a layer while the host's other devices rest, and while they work, in turns
DRAW = "draw"  # what a row whose token is drawn, not the likeliest one, adds to a pass of the last stage
PARTS = ("layer", "embed", "head", *TRIAL_PARTS, NEW_SIZE, NEW_SIZE_MIXED, DRAW, CONTENTION, ALONE, TOGETHER)
LIBRARIES = ("torch", "transformers", "hqq", "deepspeed")
_REMEDY = "make one with `ds-llmpq profile`"

Part = one_of(*PARTS)
Phase = one_of("prefill", "decode")
Width = one_of(0, *BIT_WIDTHS)  # 0: of a part that has none


@dataclass(frozen=True)
class Setup:
    """What the times of a profile depend on beside the point. All of it must agree before they are used or extended."""

    layer: Name  # `layer_signature` of the model
    dtype: one_of(*COMPUTE_DTYPES)
    kernel: Name
    group_size: Positive
    axis: Annotated[int, Ge(0), Le(1)]
    libraries: Table[Label]
    per_channel_bits: list[Width] = field(default_factory=list)
    lm_head_bits: Width = UNQUANTIZED_BITS
    zeros: one_of(*ZEROS) = "real"  # as in files that do not say, and of kernels that take as long with either

    def __post_init__(self) -> None:
        if self.lm_head_bits not in (*PACKED_BITS, UNQUANTIZED_BITS):
            raise ValueError(f"lm_head_bits is {self.lm_head_bits!r}")

    @property
    def groups(self) -> Groups:
        """`UserError` where a file noted what cannot be."""
        names = ("group_size", "axis", "per_channel_bits", "zeros")
        return make_groups(QuantConfig(**{name: getattr(self, name) for name in names}))

    def disagreement(self, other: Setup) -> str | None:
        """The first difference in words, or None."""
        for entry in fields(self):
            mine, theirs = getattr(self, entry.name), getattr(other, entry.name)
            if entry.name == "libraries":
                for name in dict.fromkeys([*LIBRARIES, *mine, *theirs]):
                    if mine.get(name) != theirs.get(name):
                        return f"{name} {mine.get(name)}, but {name} {theirs.get(name)} is in use"
            elif mine != theirs:
                what = "layer shape" if entry.name == "layer" else entry.name
                return f"{what} {mine}, but {what} {theirs} is in use"
        return None


@dataclass(frozen=True)
class Point:
    """What was timed. `length_tokens`: tokens of a prompt in prefill, tokens already cached in decode.

    part: `layer`, `embed`, `head`, what a pass costs beside those on the `first`, a `middle` or the `last` stage, or
    `new_size`: what the first pass of `length_tokens` tokens in all costs beyond the next ones; `new_size_mixed`: on a
    stage that has both unquantized and quantized layers; `draw`: what a row whose token is drawn adds to a pass;
    `contention`: what a pass takes beyond its work while other stages work on the same host;
    `alone` and `together`: a layer, while the host's other devices rest and while they work too.
    bits: 0 where the part has none.
    """

    device_type: Name
    part: Part
    phase: Phase
    bits: Width
    batch: Positive
    length_tokens: Count

    @property
    def tokens(self) -> int:
        """That a pass computes."""
        return self.batch * (self.length_tokens if self.phase == "prefill" else 1)


@dataclass(frozen=True)
class Sample:
    """One round of repeats at a point. `spread`: interquartile range over median. `undisturbed`: repeats that had
    their processor to themselves. The times are wall times of these; of a CPU stage's thread that had too few such
    repeats (under a third), they are processor times divided by its share."""

    point: Point
    round: Count
    repeats: Count
    undisturbed: Count
    median_seconds: Seconds
    minimum_seconds: Seconds
    spread: Amount


@dataclass(frozen=True)
class Measured:
    """All rounds of a point as one number."""

    point: Point
    seconds: float
    spread: float
    rounds: int


@dataclass(frozen=True)
class Profile:
    setup: Setup
    samples: tuple[Sample, ...]
    note: Mapping[str, Any] = field(default_factory=dict)  # date, host, processors, context bytes

    def measured(self) -> list[Measured]:
        """Points in order of appearance; the least of their rounds, for other work only ever adds time, and for a round
        or two at once. Devices of a type that were timed together in a round count by their mean. What passes of the
        trial pipeline cost is single passes: of these the lower median."""
        rounds: dict[Point, list[Sample]] = defaultdict(list)
        for sample in self.samples:
            rounds[sample.point].append(sample)
        merged = []
        for point, samples in rounds.items():
            times = sorted(sample.median_seconds for sample in samples)
            across = (times[-1] - times[0]) / times[0] if times[0] > 0 else math.inf
            spread = max(median(sample.spread for sample in samples), across)
            if point.part in TRIAL_PARTS:
                chosen = times[(len(times) - 1) // 2]
            else:
                by_round = {sample.round for sample in samples}
                chosen = min(mean(s.median_seconds for s in samples if s.round == turn) for turn in by_round)
            merged.append(Measured(point, chosen, spread, len(samples)))
        return merged

    def alone_shares(self) -> dict[tuple[str, str], float]:
        """By device type and phase: the share of its time that a layer takes while the host's other devices rest; at
        most 1. The median over what was timed in turns; a type whose devices were not timed alone is left out."""
        times: dict[tuple[Point, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for sample in self.samples:
            if sample.point.part in (ALONE, TOGETHER):
                turn = replace(sample.point, part="layer"), sample.round
                times[turn][sample.point.part].append(sample.median_seconds)
        shares = defaultdict(list)
        for (point, _), turns in times.items():
            if len(turns) == 2 and all(map(all, turns.values())):
                shares[point.device_type, point.phase].append(mean(turns[ALONE]) / mean(turns[TOGETHER]))
        return {key: min(1.0, median(found)) for key, found in shares.items()}

    def contentions(self) -> dict[str, float]:
        """By device type: the mean of what was measured, for a run pays for disturbances too; but one that is more than
        twice the median counts for no more than that."""
        times = defaultdict(list)
        for sample in self.samples:
            if sample.point.part == CONTENTION:
                times[sample.point.device_type].append(sample.median_seconds)
        return {name: mean(min(seconds, 2 * median(found)) for seconds in found) for name, found in times.items()}


def layer_signature(shape: ModelShape) -> str:
    """16 digits that change with anything that changes a part's time, but not with the number of layers."""
    kept = {key: value for key, value in asdict(shape).items() if key not in ("layers", "dtype", "max_positions")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def current_setup(
    shape: ModelShape, dtype: str, kernel: Kernel, groups: Groups, lm_head_bits: int = UNQUANTIZED_BITS
) -> Setup:
    """With the libraries installed here, that of the kernel among them; none of them is imported."""
    libraries = {name: find_version(name) for name in LIBRARIES}
    if kernel.library:
        libraries[kernel.library] = find_version(kernel.library)
    how = groups.to_json() | {"lm_head_bits": lm_head_bits}
    if not kernel.whole_zeros:
        how["zeros"] = "real"
    return Setup(layer_signature(shape), dtype, kernel.name, libraries=libraries, **how)


def find_version(library: str) -> str:
    """Of the one installed here, or "none"."""
    try:
        return metadata.version(library).partition("+")[0]  # a build's suffix (+cpu, +cu130) follows from the device
    except metadata.PackageNotFoundError:
        return "none"


_SAMPLE_COLUMNS = [entry.name for entry in fields(Sample) if entry.name != "point"]
_POINT_COLUMNS = [entry.name for entry in fields(Point)]
COLUMNS = _POINT_COLUMNS + _SAMPLE_COLUMNS


@dataclass(frozen=True)
class _Header:
    """The first line of the file."""

    schema: one_of(SCHEMA)
    setup: Setup
    note: Plain


def write_header(path: Path, setup: Setup, note: Mapping[str, Any]) -> None:
    header = {"schema": SCHEMA, "setup": asdict(setup), "note": dict(note)}
    path.write_text(f"# {json.dumps(header)}\n{','.join(COLUMNS)}\n", encoding="utf-8")


def append(path: Path, samples: Iterable[Sample]) -> None:
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for sample in samples:
            row = asdict(sample)
            cells = row.pop("point") | row
            writer.writerow([f"{value:.9g}" if isinstance(value, float) else value for value in cells.values()])


def read_profile(path: str | Path) -> Profile:
    """`UserError`: unreadable, of another schema, or a row that makes no sense. A last line cut short is dropped."""
    where = f"profile {path}"
    text = read_text(path, "profile", _REMEDY)
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]  # the writer was stopped in the middle of it
    first, _, table = text.partition("\n")
    header = rename_setup(parse_json(first.removeprefix("# "), where, _REMEDY), where)
    header = validate(_Header, header, where, _REMEDY)
    samples = []
    for number, row in read_csv(table, where, _REMEDY, COLUMNS):
        cells = {name: row[name] for name in _SAMPLE_COLUMNS} | {"point": {name: row[name] for name in _POINT_COLUMNS}}
        samples.append(validate_cells(Sample, cells, f"{where} line {number + 1}", "remove that line"))
    return Profile(header.setup, tuple(samples), header.note)


def rename_setup(record: Any, where: str) -> Any:
    """The record of a profile or of its fit, its setup by present names."""
    if not isinstance(record, dict) or "setup" not in record:
        return record
    return record | {"setup": rename_former(record["setup"], where)}


def check_setup(found: Setup, setup: Setup, where: str, remedy: str) -> None:
    """`UserError` unless a profile with setup `found` fits `setup`; `remedy` ends the sentence."""
    difference = found.disagreement(setup)
    if difference:
        raise UserError(f"{where} was measured with {difference}; {remedy}")
