"""The planning problem as plain data: `problem.json`, schema 1, free of models, files and frameworks.

The dataclasses are the schema: `ds_llmpq.validation` reads them, and what several fields must be together is checked
here. `Problem.from_json(problem.to_json()) == problem` always holds. Times are seconds, sizes bytes.
"""

import math
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, Field

from ds_llmpq.errors import UserError
from ds_llmpq.plan.plan import MOST_LAYERS, to_plain
from ds_llmpq.plan.plan_parts import Workload
from ds_llmpq.validation import (
    Amount,
    Distinct,
    LayerBits,
    Many,
    Name,
    OneOrMany,
    Positive,
    PossiblyInfinite,
    Some,
    Table,
    TableByNumber,
    one_of,
    validate,
)

SCHEMA = 1
MODES = ("theta", "max_quality_loss", "max_latency")
REMEDY = "correct it"


def _available(seconds: Mapping[int, float | None]) -> dict[int, float]:
    return {size: value for size, value in seconds.items() if value is not None and not math.isinf(value)}


# Whole bytes stay integers: they are exact, and shown without a point.
Bytes = Annotated[Amount, AfterValidator(lambda size: int(size) if size.is_integer() else size)]
SecondsBySize = Annotated[TableByNumber[PossiblyInfinite | None], AfterValidator(_available)]
AloneShare = Annotated[float, Gt(0), Le(1)]
SecondsByBits = TableByNumber[Annotated[SecondsBySize | None, AfterValidator(lambda seconds: seconds or {})]]


@dataclass(frozen=True)
class MicroBatchCandidates:
    """Candidate micro-batch sizes, in sequences: eta for prefill, xi for decode."""

    prefill: Distinct[Positive]
    decode: Distinct[Positive]


@dataclass(frozen=True)
class DeviceSpeeds:
    """What one type of device can run and how fast. An absent entry, null or infinity means: not available; a type with
    no bits cannot hold a layer.

    `*_layer_seconds[bits][size]` is one layer for one micro-batch, `*_embed_seconds[size]` and
    `*_head_seconds[size]` are charged on the stage that holds the part. `contention_seconds` of each of
    these are spared a plan with one stage, and it takes `*_alone_share` of the rest: its device has the host to itself.
    `*_error`: how far off these times are on average, as a share of them, by what was measured; None: not known.
    """

    bits: Many[LayerBits]
    prefill_layer_seconds: SecondsByBits
    decode_layer_seconds: SecondsByBits
    prefill_embed_seconds: SecondsBySize
    prefill_head_seconds: SecondsBySize
    decode_embed_seconds: SecondsBySize
    decode_head_seconds: SecondsBySize
    prefill_alone_share: AloneShare = 1.0
    decode_alone_share: AloneShare = 1.0
    contention_seconds: Amount = 0.0
    prefill_error: Amount | None = None
    decode_error: Amount | None = None

    @property
    def faster_alone(self) -> bool:
        return self.contention_seconds > 0 or min(self.prefill_alone_share, self.decode_alone_share) < 1


@dataclass(frozen=True)
class ProblemDevice:
    name: Name
    type: Name
    memory_bytes: Bytes


@dataclass(frozen=True)
class WorkspaceBytes:
    """What a phase needs beside weights and cache, by micro-batch size."""

    prefill: TableByNumber[Bytes]
    decode: TableByNumber[Bytes]


@dataclass(frozen=True)
class Memory:
    """What a stage has to hold. `layer_bytes[bits]` has one entry a layer; a file may give one for all. `tied_bytes`:
    those of the head that are the embedding's own where one stage has both and `tied_head` is set; None: all."""

    layer_bytes: TableByNumber[OneOrMany[Bytes]]
    kv_bytes_per_sequence_layer: Bytes
    embed_bytes: Bytes
    head_bytes: Bytes
    workspace_bytes: WorkspaceBytes
    tied_head: bool = False
    tied_bytes: Bytes | None = None


@dataclass(frozen=True)
class LinkCost:
    latency_seconds: Amount
    seconds_per_byte: Amount


@dataclass(frozen=True)
class _Pair:
    sender: Annotated[Name, Field(alias="from")]
    receiver: Annotated[Name, Field(alias="to")]
    latency_seconds: Amount
    seconds_per_byte: Amount


def _by_ends(pairs: Iterable[_Pair]) -> dict[tuple[str, str], LinkCost]:
    found: dict[tuple[str, str], LinkCost] = {}
    for pair in pairs:
        ends = (pair.sender, pair.receiver)
        if ends in found:
            raise ValueError(f"must list each direction once, and repeats the link from {ends[0]!r} to {ends[1]!r}")
        found[ends] = LinkCost(pair.latency_seconds, pair.seconds_per_byte)
    return found


@dataclass(frozen=True)
class LinkCosts:
    """Directed links between devices, by (sender, receiver); a pair that is not listed is the default link."""

    default: LinkCost
    hidden_bytes_per_token: Bytes
    token_bytes: Bytes
    pairs: Annotated[Many[_Pair], AfterValidator(_by_ends)] = field(default_factory=dict)

    def between(self, sender: str, receiver: str) -> LinkCost:
        return self.pairs.get((sender, receiver), self.default)


@dataclass(frozen=True)
class Objective:
    """`theta`: minimise latency + theta * quality loss, `max_quality_loss`: the same with a loss of at most `limit`,
    `max_latency`: minimise the loss with a latency of at most `limit`."""

    mode: one_of(*MODES)
    theta: Amount = 0.0
    limit: Amount = 0.0

    @property
    def key(self) -> str:
        """The one of `theta` and `limit` that counts."""
        return "theta" if self.mode == "theta" else "limit"


@dataclass(frozen=True)
class Problem:
    """A planning problem; `sensitivity[layer][bit index]` is the quality loss of that layer at `bits[bit index]`."""

    schema: one_of(SCHEMA)
    layers: Annotated[int, Ge(1), Le(MOST_LAYERS)]
    bits: Distinct[LayerBits]
    workload: Workload
    micro_batches: MicroBatchCandidates
    device_types: Table[DeviceSpeeds]
    devices: Some[ProblemDevice]
    memory: Memory
    links: LinkCosts
    sensitivity: Many[Many[Amount]]
    objective: Objective
    device_order: one_of("free", "fixed") = "free"

    @classmethod
    def from_json(cls, obj: Any) -> "Problem":
        """Read the parsed JSON object; raises `UserError` naming the key path, the value, the bound and the remedy."""
        if isinstance(obj, Mapping) and "omega" in obj and "sensitivity" not in obj:
            print("note: problem.omega is now called sensitivity; the next version reads only that.", file=sys.stderr)
            obj = {"sensitivity" if key == "omega" else key: value for key, value in obj.items()}
        problem = validate(cls, obj, "problem", REMEDY)
        _check_objective(problem.objective, obj["objective"])
        _check_devices(problem)
        _check_sizes(problem)
        layer_bytes = {
            b: sizes if isinstance(sizes, tuple) else (sizes,) * problem.layers
            for b, sizes in problem.memory.layer_bytes.items()
        }
        types = {
            name: replace(entry, bits=tuple(b for b in problem.bits if b in entry.bits))
            for name, entry in problem.device_types.items()
        }
        return replace(problem, device_types=types, memory=replace(problem.memory, layer_bytes=layer_bytes))

    @cached_property
    def by_name(self) -> dict[str, ProblemDevice]:
        """The devices by their names."""
        return {device.name: device for device in self.devices}

    @cached_property
    def arrays(self) -> dict[tuple[int, int], Any]:
        """What `pair_arrays` has filled, by micro-batch pair."""
        return {}

    def with_devices(self, names: Iterable[str]) -> "Problem":
        """With these devices alone, in this order, and the links between them."""
        kept = tuple(self.by_name[name] for name in names)
        known = {device.name for device in kept}
        pairs = {ends: link for ends, link in self.links.pairs.items() if known.issuperset(ends)}
        return replace(self, devices=kept, links=replace(self.links, pairs=pairs))

    def to_json(self) -> dict[str, Any]:
        """The JSON object of schema 1."""
        obj = to_plain(asdict(replace(self, links=replace(self.links, pairs={}))))
        layer_bytes = obj["memory"]["layer_bytes"]
        layer_bytes |= {b: sizes[0] for b, sizes in layer_bytes.items() if len(set(sizes)) == 1}
        obj["links"]["pairs"] = [{"from": a, "to": b, **vars(link)} for (a, b), link in self.links.pairs.items()]
        objective = obj["objective"]
        if not (self.objective.mode == "max_quality_loss" and self.objective.theta):
            del objective["limit" if self.objective.key == "theta" else "theta"]
        return obj


def _check_objective(objective: Objective, given: Mapping[str, Any]) -> None:
    optional = {"theta"} if objective.mode == "max_quality_loss" else set()
    for name in sorted({"mode", objective.key} ^ (set(given) - optional)):
        what = "has the unknown key" if name in given else "lacks the key"
        raise UserError(f"problem.objective {what} {name!r}, its mode is {objective.mode}; {REMEDY}.")


def _check_devices(problem: Problem) -> None:
    """Names are distinct, and those of types and of links' ends are known."""
    if not problem.device_types:
        raise UserError("problem.device_types is {}, but must have at least one type; add it.")
    names: set[str] = set()
    for i, device in enumerate(problem.devices):
        path = f"problem.devices[{i}]"
        if device.type not in problem.device_types:
            known = ", ".join(problem.device_types)
            raise UserError(f"{path}.type is {device.type!r}, but must be one of {known}; {REMEDY}.")
        if device.name in names:
            raise UserError(f"{path}.name is {device.name!r}, which an earlier device has; give each its own name.")
        names.add(device.name)
    for i, ends in enumerate(problem.links.pairs):
        for key, name in zip(("from", "to"), ends, strict=True):
            if name not in names:
                path = f"problem.links.pairs[{i}].{key}"
                raise UserError(f"{path} is {name!r}, but no device has that name; correct it or add the device.")


def _check_sizes(problem: Problem) -> None:
    """Tables are by the problem's own bits, sizes and layers."""
    sizes, memory = problem.micro_batches, problem.memory
    for name, entry in problem.device_types.items():
        path = f"problem.device_types.{name}"
        for i, width in enumerate(entry.bits):
            if width not in problem.bits or width in entry.bits[:i]:
                known = ", ".join(map(str, problem.bits))
                raise UserError(f"{path}.bits[{i}] is {width}, but must be one of problem.bits ({known}), each once.")
        for phase in ("prefill", "decode"):
            by_bits = getattr(entry, f"{phase}_layer_seconds")
            _check_keys(by_bits, problem.bits, f"{path}.{phase}_layer_seconds")
            for width, seconds in by_bits.items():
                _check_keys(seconds, getattr(sizes, phase), f"{path}.{phase}_layer_seconds.{width}")
            for part in (f"{phase}_embed_seconds", f"{phase}_head_seconds"):
                _check_keys(getattr(entry, part), getattr(sizes, phase), f"{path}.{part}")
                least = min(getattr(entry, part).values(), default=math.inf)
                if least < entry.contention_seconds:
                    most = f"at most {least:g}, the least of {part}, which it is a part of"
                    raise UserError(f"{path}.contention_seconds is {entry.contention_seconds:g}, but must be {most}.")
    for phase in ("prefill", "decode"):
        path = f"problem.memory.workspace_bytes.{phase}"
        _check_keys(getattr(memory.workspace_bytes, phase), getattr(sizes, phase), path, all_of_them=True)
    _check_keys(memory.layer_bytes, problem.bits, "problem.memory.layer_bytes", all_of_them=True)
    for width, entries in memory.layer_bytes.items():
        if isinstance(entries, tuple):
            _check_length(entries, problem.layers, f"problem.memory.layer_bytes.{width}")
    _check_length(problem.sensitivity, problem.layers, "problem.sensitivity")
    for i, row in enumerate(problem.sensitivity):
        _check_length(row, len(problem.bits), f"problem.sensitivity[{i}]")


def _check_keys(found: Collection[int], known: Collection[int], path: str, *, all_of_them: bool = False) -> None:
    for key in found:
        if key not in known:
            names = ", ".join(map(str, known))
            raise UserError(f"{path} has the unknown key '{key}'; remove it or declare it, known are {names}.")
    for key in known if all_of_them else ():
        if key not in found:
            raise UserError(f"{path} lacks the key '{key}'; add it.")


def _check_length(values: Collection[Any], length: int, path: str) -> None:
    if len(values) != length:
        raise UserError(f"{path} has {len(values)} entries, but must have {length}; add or remove some.")
