"""The planning problem as plain data: `problem.json`, schema 1, free of models, files and frameworks.

`Problem.from_json` reads it strictly (a `UserError` for each mistake), `Problem.to_json` writes it back;
`Problem.from_json(problem.to_json()) == problem` always holds. Times are seconds, sizes bytes.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_llmpq.errors import UserError
from ds_llmpq.plan import reading
from ds_llmpq.plan.plan import Workload

SCHEMA = 1
MOST_LAYERS = 10_000
MODES = ("theta", "max_quality_loss", "max_latency")


@dataclass(frozen=True)
class MicroBatchCandidates:
    """Candidate micro-batch sizes, in sequences: eta for prefill, xi for decode."""

    prefill: tuple[int, ...]
    decode: tuple[int, ...]


@dataclass(frozen=True)
class DeviceType:
    """What one type of device can run and how fast; an absent entry means: not available.

    `*_layer_seconds[bits][size]` is one layer for one micro-batch, `*_embed_seconds[size]` and
    `*_head_seconds[size]` are charged on the stage that holds the part.
    """

    bits: tuple[int, ...]
    prefill_layer_seconds: Mapping[int, Mapping[int, float]]
    decode_layer_seconds: Mapping[int, Mapping[int, float]]
    prefill_embed_seconds: Mapping[int, float]
    prefill_head_seconds: Mapping[int, float]
    decode_embed_seconds: Mapping[int, float]
    decode_head_seconds: Mapping[int, float]


@dataclass(frozen=True)
class Device:
    name: str
    type: str
    memory_bytes: float


@dataclass(frozen=True)
class WorkspaceBytes:
    """What a phase needs beside weights and cache, by micro-batch size."""

    prefill: Mapping[int, float]
    decode: Mapping[int, float]


@dataclass(frozen=True)
class Memory:
    """What a stage has to hold. `layer_bytes[bits]` has one entry a layer."""

    layer_bytes: Mapping[int, tuple[float, ...]]
    kv_bytes_per_sequence_layer: float
    embed_bytes: float
    head_bytes: float
    tied_head: bool
    workspace_bytes: WorkspaceBytes


@dataclass(frozen=True)
class Link:
    latency_seconds: float
    seconds_per_byte: float


@dataclass(frozen=True)
class Links:
    """Directed links between devices; a pair that is not listed is the default link."""

    default: Link
    pairs: Mapping[tuple[str, str], Link]
    hidden_bytes_per_token: float
    token_bytes: float

    def between(self, sender: str, receiver: str) -> Link:
        return self.pairs.get((sender, receiver), self.default)


@dataclass(frozen=True)
class Objective:
    """`theta`: minimise latency + theta * quality loss; the other modes bound one of the two by `limit`."""

    mode: str
    theta: float = 0.0
    limit: float = 0.0


@dataclass(frozen=True)
class Problem:
    """A planning problem; `sensitivity[layer][bit index]` is the quality loss of that layer at `bits[bit index]`."""

    layers: int
    bits: tuple[int, ...]
    workload: Workload
    micro_batches: MicroBatchCandidates
    device_types: Mapping[str, DeviceType]
    devices: tuple[Device, ...]
    device_order: str
    memory: Memory
    links: Links
    sensitivity: tuple[tuple[float, ...], ...]
    objective: Objective

    @classmethod
    def from_json(cls, obj: Any) -> "Problem":
        """Read the parsed JSON object; raises `UserError` naming the key path, the value, the bound and the remedy."""
        if isinstance(obj, Mapping) and "omega" in obj and "sensitivity" not in obj:
            print("note: problem.omega is now called sensitivity; the next version reads only that.", file=sys.stderr)
            obj = {"sensitivity" if key == "omega" else key: value for key, value in obj.items()}
        names = "layers bits workload micro_batches device_types devices memory links sensitivity objective"
        reading.keys(obj, "problem", ["schema", *names.split()], ["device_order"])
        if isinstance(obj["schema"], bool) or obj["schema"] != SCHEMA:
            raise UserError(f"problem.schema is {reading.shown(obj['schema'])}, but this version reads {SCHEMA} only.")
        layers = reading.integer(obj["layers"], "problem.layers")
        if layers > MOST_LAYERS:
            raise UserError(f"problem.layers is {reading.shown(layers)}, but must be at most {MOST_LAYERS}.")
        bits = reading.distinct_integers(obj["bits"], "problem.bits")
        sizes = _micro_batches(obj["micro_batches"])
        types = _device_types(obj["device_types"], bits, sizes)
        devices = _devices(obj["devices"], types)
        return cls(
            layers=layers,
            bits=bits,
            workload=_workload(obj["workload"]),
            micro_batches=sizes,
            device_types=types,
            devices=devices,
            device_order=reading.text(obj.get("device_order", "free"), "problem.device_order", ("free", "fixed")),
            memory=_memory(obj["memory"], layers, bits, sizes),
            links=_links(obj["links"], {device.name for device in devices}),
            sensitivity=_sensitivity(obj["sensitivity"], layers, len(bits)),
            objective=_objective(obj["objective"]),
        )

    def to_json(self) -> dict[str, Any]:
        """The JSON object of schema 1."""
        memory = self.memory
        return {
            "schema": SCHEMA,
            "layers": self.layers,
            "bits": list(self.bits),
            "workload": vars(self.workload).copy(),
            "micro_batches": {"prefill": list(self.micro_batches.prefill), "decode": list(self.micro_batches.decode)},
            "device_types": {name: _type_to_json(entry) for name, entry in self.device_types.items()},
            "devices": [vars(device).copy() for device in self.devices],
            "device_order": self.device_order,
            "memory": {
                "layer_bytes": {str(b): _one_or_list(values) for b, values in memory.layer_bytes.items()},
                "kv_bytes_per_sequence_layer": memory.kv_bytes_per_sequence_layer,
                "embed_bytes": memory.embed_bytes,
                "head_bytes": memory.head_bytes,
                "tied_head": memory.tied_head,
                "workspace_bytes": {
                    "prefill": _string_keys(memory.workspace_bytes.prefill),
                    "decode": _string_keys(memory.workspace_bytes.decode),
                },
            },
            "links": {
                "default": vars(self.links.default).copy(),
                "pairs": [{"from": a, "to": b, **vars(link)} for (a, b), link in self.links.pairs.items()],
                "hidden_bytes_per_token": self.links.hidden_bytes_per_token,
                "token_bytes": self.links.token_bytes,
            },
            "sensitivity": [list(row) for row in self.sensitivity],
            "objective": _objective_to_json(self.objective),
        }


def _workload(obj: Any) -> Workload:
    names = ("sequences", "prompt_tokens", "generated_tokens")
    reading.keys(obj, "problem.workload", names)
    return Workload(*(reading.integer(obj[name], f"problem.workload.{name}") for name in names))


def _micro_batches(obj: Any) -> MicroBatchCandidates:
    reading.keys(obj, "problem.micro_batches", ("prefill", "decode"))
    return MicroBatchCandidates(
        reading.distinct_integers(obj["prefill"], "problem.micro_batches.prefill"),
        reading.distinct_integers(obj["decode"], "problem.micro_batches.decode"),
    )


def _device_types(obj: Any, bits: tuple[int, ...], sizes: MicroBatchCandidates) -> dict[str, DeviceType]:
    if not isinstance(obj, Mapping) or not obj:
        raise UserError(f"problem.device_types is {reading.shown(obj)}, but must be an object with at least one type.")
    return {name: _device_type(entry, f"problem.device_types.{name}", bits, sizes) for name, entry in obj.items()}


def _device_type(obj: Any, path: str, bits: tuple[int, ...], sizes: MicroBatchCandidates) -> DeviceType:
    tables = {"prefill_layer_seconds": sizes.prefill, "decode_layer_seconds": sizes.decode}
    parts = {
        "prefill_embed_seconds": sizes.prefill,
        "prefill_head_seconds": sizes.prefill,
        "decode_embed_seconds": sizes.decode,
        "decode_head_seconds": sizes.decode,
    }
    reading.keys(obj, path, ["bits", *tables, *parts])
    # A type without any feasible bit width is legal: it simply cannot hold a layer.
    feasible = reading.distinct_integers(obj["bits"], f"{path}.bits") if obj["bits"] != [] else ()
    for i, width in enumerate(feasible):
        if width not in bits:
            raise UserError(
                f"{path}.bits[{i}] is {width}, but must be one of problem.bits ({', '.join(map(str, bits))})."
            )

    def times(value: Any, where: str, allowed: tuple[int, ...]) -> dict[int, float]:
        read = reading.by_integer(value, where, allowed, reading.seconds_or_absent, complete=False)
        return {size: seconds for size, seconds in read.items() if seconds is not None}

    fields: dict[str, Any] = {name: times(obj[name], f"{path}.{name}", allowed) for name, allowed in parts.items()}
    for name, allowed in tables.items():
        fields[name] = reading.by_integer(
            obj[name],
            f"{path}.{name}",
            bits,
            lambda value, where, allowed=allowed: {} if value is None else times(value, where, allowed),
            complete=False,
        )
    return DeviceType(bits=tuple(b for b in bits if b in feasible), **fields)


def _devices(obj: Any, types: Mapping[str, DeviceType]) -> tuple[Device, ...]:
    devices: list[Device] = []
    for i, entry in enumerate(reading.items(obj, "problem.devices")):
        path = f"problem.devices[{i}]"
        reading.keys(entry, path, ("name", "type", "memory_bytes"))
        device = Device(
            reading.text(entry["name"], f"{path}.name"),
            reading.text(entry["type"], f"{path}.type", tuple(types)),
            reading.number(entry["memory_bytes"], f"{path}.memory_bytes"),
        )
        if any(device.name == other.name for other in devices):
            raise UserError(f"{path}.name is {device.name!r}, which an earlier device has; give each its own name.")
        devices.append(device)
    return tuple(devices)


def _memory(obj: Any, layers: int, bits: tuple[int, ...], sizes: MicroBatchCandidates) -> Memory:
    path = "problem.memory"
    names = "layer_bytes kv_bytes_per_sequence_layer embed_bytes head_bytes workspace_bytes"
    reading.keys(obj, path, names.split(), ["tied_head"])

    def layer_bytes(value: Any, where: str) -> tuple[float, ...]:
        if isinstance(value, (list, tuple)):
            entries = reading.items(value, where, length=layers)
            return tuple(reading.number(entry, f"{where}[{i}]") for i, entry in enumerate(entries))
        return (reading.number(value, where),) * layers

    workspace = reading.keys(obj["workspace_bytes"], f"{path}.workspace_bytes", ("prefill", "decode"))
    by_size = {
        phase: reading.by_integer(
            workspace[phase], f"{path}.workspace_bytes.{phase}", allowed, reading.number, complete=True
        )
        for phase, allowed in (("prefill", sizes.prefill), ("decode", sizes.decode))
    }
    return Memory(
        layer_bytes=reading.by_integer(obj["layer_bytes"], f"{path}.layer_bytes", bits, layer_bytes, complete=True),
        kv_bytes_per_sequence_layer=reading.number(
            obj["kv_bytes_per_sequence_layer"], f"{path}.kv_bytes_per_sequence_layer"
        ),
        embed_bytes=reading.number(obj["embed_bytes"], f"{path}.embed_bytes"),
        head_bytes=reading.number(obj["head_bytes"], f"{path}.head_bytes"),
        tied_head=reading.boolean(obj.get("tied_head", False), f"{path}.tied_head"),
        workspace_bytes=WorkspaceBytes(**by_size),
    )


def _links(obj: Any, names: set[str]) -> Links:
    path = "problem.links"
    reading.keys(obj, path, ("default", "hidden_bytes_per_token", "token_bytes"), ("pairs",))

    def link(value: Any, where: str, more: tuple[str, ...] = ()) -> Link:
        reading.keys(value, where, (*more, "latency_seconds", "seconds_per_byte"))
        return Link(*(reading.number(value[key], f"{where}.{key}") for key in ("latency_seconds", "seconds_per_byte")))

    pairs: dict[tuple[str, str], Link] = {}
    for i, entry in enumerate(reading.items(obj.get("pairs", []), f"{path}.pairs", empty=True)):
        where = f"{path}.pairs[{i}]"
        read = link(entry, where, ("from", "to"))
        ends = tuple(reading.text(entry[key], f"{where}.{key}") for key in ("from", "to"))
        for key, name in zip(("from", "to"), ends, strict=True):
            if name not in names:
                raise UserError(
                    f"{where}.{key} is {name!r}, but no device has that name; correct it or add the device."
                )
        if ends in pairs:
            raise UserError(f"{where} repeats the link from {ends[0]!r} to {ends[1]!r}; list each direction once.")
        pairs[ends] = read
    return Links(
        default=link(obj["default"], f"{path}.default"),
        pairs=pairs,
        hidden_bytes_per_token=reading.number(obj["hidden_bytes_per_token"], f"{path}.hidden_bytes_per_token"),
        token_bytes=reading.number(obj["token_bytes"], f"{path}.token_bytes"),
    )


def _sensitivity(obj: Any, layers: int, widths: int) -> tuple[tuple[float, ...], ...]:
    rows = []
    for i, row in enumerate(reading.items(obj, "problem.sensitivity", length=layers)):
        entries = reading.items(row, f"problem.sensitivity[{i}]", length=widths)
        rows.append(tuple(float(reading.number(v, f"problem.sensitivity[{i}][{j}]")) for j, v in enumerate(entries)))
    return tuple(rows)


def _objective(obj: Any) -> Objective:
    path = "problem.objective"
    if not isinstance(obj, Mapping) or "mode" not in obj:
        raise UserError(
            f"{path} is {reading.shown(obj)}, but must be an object with a mode: one of {', '.join(MODES)}."
        )
    mode = reading.text(obj["mode"], f"{path}.mode", MODES)
    key = "theta" if mode == "theta" else "limit"
    reading.keys(obj, path, ("mode", key))
    return Objective(mode=mode, **{key: reading.number(obj[key], f"{path}.{key}")})


def _objective_to_json(objective: Objective) -> dict[str, Any]:
    key = "theta" if objective.mode == "theta" else "limit"
    return {"mode": objective.mode, key: getattr(objective, key)}


def _type_to_json(entry: DeviceType) -> dict[str, Any]:
    obj: dict[str, Any] = {"bits": list(entry.bits)}
    for name in ("prefill_layer_seconds", "decode_layer_seconds"):
        obj[name] = {str(b): _string_keys(times) for b, times in getattr(entry, name).items()}
    for name in ("prefill_embed_seconds", "prefill_head_seconds", "decode_embed_seconds", "decode_head_seconds"):
        obj[name] = _string_keys(getattr(entry, name))
    return obj


def _string_keys(values: Mapping[int, float]) -> dict[str, float]:
    return {str(key): value for key, value in values.items()}


def _one_or_list(values: tuple[float, ...]) -> float | list[float]:
    return values[0] if all(value == values[0] for value in values) else list(values)
