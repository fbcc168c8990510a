"""`plan.json`: what was decided, what it is predicted to cost, and how far from the optimum it can be at most.

`Plan.to_json` and `Plan.from_json` are inverse to each other; `from_json` raises a `UserError` for each mistake.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ds_llmpq.cluster.devices import COMPUTE_DTYPES, KINDS
from ds_llmpq.errors import UserError
from ds_llmpq.plan import reading
from ds_llmpq.plan.assignment import Assignment, StageAssignment
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.validation import checked
from ds_llmpq.wording import plain

SCHEMA = 1
MEMORY_PARTS = ("weights", "kv", "embed", "head", "workspace")
PREDICTED = ("latency_seconds", "prefill_seconds", "decode_seconds", "throughput_tokens_per_second", "quality_loss")


@dataclass(frozen=True)
class Workload:
    """A batch of B = `sequences`, each with s prompt tokens and n generated tokens."""

    sequences: int
    prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: layers [first, last) with one bit width each, on one device.

    `prefill_seconds` and `decode_seconds` are P_j and D_j, for one micro-batch. `host` and `kernel` stay null for a
    problem that came as plain data.
    """

    rank: int
    host: str | None
    device: str
    device_type: str
    layers: tuple[int, int]
    bits: tuple[int, ...]
    kernel: str | None
    memory_bytes: Mapping[str, float]
    memory_budget_bytes: float
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class SolverReport:
    """`bound` is proven: no plan has a smaller objective; `gap` = (objective - bound) / bound, null at a bound of 0.

    `status` is "optimal" (gap closed to the one asked for), "time_limit" or "interrupted" (incumbent and bound so
    far), "stalled" (nothing left to try that would raise the bound), or "checked" (a plan given by hand, no bound).
    """

    name: str
    objective: float
    bound: float | None
    gap: float | None
    seconds: float
    status: str

    @property
    def proof(self) -> str:
        """How far above the optimum the objective can be, in words; empty for a plan without a bound."""
        if self.bound is None:
            return ""
        return "nothing proven yet" if self.gap is None else f"at most {plain(100 * self.gap, 2)} % above the optimum"


@dataclass(frozen=True)
class Plan:
    """A complete plan. `baselines` maps a name to predicted totals or to the reason why it has no plan."""

    model: Mapping[str, Any] | None
    workload: Workload
    stages: tuple[Stage, ...]
    micro_batch: Mapping[str, int]
    predicted: Mapping[str, float]
    solver: SolverReport
    baselines: Mapping[str, Mapping[str, float] | str] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    explanation: tuple[str, ...] = ()
    quant: Mapping[str, Any] | None = None
    engine: Mapping[str, Any] | None = None

    def with_fewer_sequences(self) -> "Plan":
        """The same stages with half as many sequences in flight, and in each micro-batch; at least one. What was
        predicted stays: it was for the plan as it was made."""
        sequences = max(1, self.workload.sequences // 2)
        rows = {phase: max(1, min(size // 2, sequences)) for phase, size in self.micro_batch.items()}
        return replace(self, workload=replace(self.workload, sequences=sequences), micro_batch=rows)

    def assignment(self) -> Assignment:
        """The decisions alone."""
        stages = tuple(StageAssignment(stage.device, *stage.layers, stage.bits) for stage in self.stages)
        return Assignment(stages, self.micro_batch["prefill"], self.micro_batch["decode"])

    def to_json(self) -> dict[str, Any]:
        """The JSON object of `plan.json`; `quant` is left out when absent."""
        obj = {"schema": SCHEMA, **_plain(asdict(self))}
        if self.quant is None:
            del obj["quant"]
        return obj

    @classmethod
    def from_json(cls, obj: Any) -> "Plan":
        """Read the parsed `plan.json`; raises `UserError` naming the key path, the value and the remedy."""
        names = "schema model workload stages micro_batch predicted solver baselines provenance explanation engine"
        reading.keys(obj, "plan", names.split(), ["quant"])
        if isinstance(obj["schema"], bool) or obj["schema"] != SCHEMA:
            raise UserError(f"plan.schema is {reading.shown(obj['schema'])}, but this version reads {SCHEMA} only.")
        workload = reading.keys(obj["workload"], "plan.workload", _names(Workload))
        sizes = reading.keys(obj["micro_batch"], "plan.micro_batch", ("prefill", "decode"))
        stages = reading.items(obj["stages"], "plan.stages")
        return cls(
            model=_model(obj["model"]),
            workload=Workload(*(reading.integer(workload[n], f"plan.workload.{n}") for n in _names(Workload))),
            stages=_stages(stages),
            micro_batch={n: reading.integer(sizes[n], f"plan.micro_batch.{n}") for n in ("prefill", "decode")},
            predicted=_predicted(obj["predicted"], "plan.predicted"),
            solver=_solver(obj["solver"]),
            baselines={
                reading.text(name, "plan.baselines key"): reading.note(entry, f"plan.baselines.{name}")
                if isinstance(entry, str)
                else _predicted(entry, f"plan.baselines.{name}")
                for name, entry in reading.mapping(obj["baselines"], "plan.baselines").items()
            },
            provenance={
                reading.text(name, "plan.provenance key"): reading.note(entry, f"plan.provenance.{name}")
                for name, entry in reading.mapping(obj["provenance"], "plan.provenance").items()
            },
            explanation=tuple(
                reading.note(entry, f"plan.explanation[{i}]")
                for i, entry in enumerate(reading.items(obj["explanation"], "plan.explanation", empty=True))
            ),
            quant=_quant(obj.get("quant")),
            engine=_engine(obj["engine"], len(stages)),
        )


def _names(kind: type) -> tuple[str, ...]:
    return tuple(kind.__dataclass_fields__)


def _model(obj: Any) -> Mapping[str, Any] | None:
    """Where the model is and what it is: texts or null."""
    if obj is None:
        return None
    return {
        reading.text(name, "plan.model key"): _text_or_null(value, f"plan.model.{name}")
        for name, value in reading.mapping(obj, "plan.model").items()
    }


def _quant(obj: Any) -> Mapping[str, Any] | None:
    """The settings of a `QuantConfig`, as they are."""
    return None if obj is None else asdict(checked(QuantConfig, obj, "plan.quant", "plan again"))


def _engine(obj: Any, stages: int) -> Mapping[str, Any] | None:
    """What launching needs, checked as far as it is used; null for a plan of plain data."""
    if obj is None:
        return None
    path = "plan.engine"
    for key in ("dtype", "stages", "env"):
        if key not in reading.mapping(obj, path):
            raise UserError(f"{path} lacks the key {key!r}; plan again.")
    reading.text(obj["dtype"], f"{path}.dtype", COMPUTE_DTYPES)
    for i, entry in enumerate(reading.items(obj["stages"], f"{path}.stages", length=stages)):
        where = f"{path}.stages[{i}]"
        for key in ("kind", "slot"):
            if key not in reading.mapping(entry, where):
                raise UserError(f"{where} lacks the key {key!r}; plan again.")
        reading.text(entry["kind"], f"{where}.kind", KINDS)
        reading.integer(entry["slot"], f"{where}.slot", low=0)
        if entry.get("threads") is not None:
            reading.integer(entry["threads"], f"{where}.threads")
        if entry.get("cpu_share") is not None:
            reading.number(entry["cpu_share"], f"{where}.cpu_share", low=0.05)
    for name, value in reading.mapping(obj["env"], f"{path}.env").items():
        reading.text(value, f"{path}.env.{name}")
    return obj


def _text_or_null(value: Any, path: str) -> str | None:
    return None if value is None else reading.text(value, path)


def _predicted(obj: Any, path: str) -> dict[str, float]:
    reading.keys(obj, path, PREDICTED)
    return {name: reading.number(obj[name], f"{path}.{name}", finite=False) for name in PREDICTED}


def _solver(obj: Any) -> SolverReport:
    path = "plan.solver"
    reading.keys(obj, path, _names(SolverReport))

    def optional(name: str) -> float | None:
        return None if obj[name] is None else reading.number(obj[name], f"{path}.{name}")

    return SolverReport(
        name=reading.text(obj["name"], f"{path}.name"),
        objective=reading.number(obj["objective"], f"{path}.objective"),
        bound=optional("bound"),
        gap=optional("gap"),
        seconds=reading.number(obj["seconds"], f"{path}.seconds"),
        status=reading.text(obj["status"], f"{path}.status"),
    )


def _stages(entries: Sequence[Any]) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    for i, entry in enumerate(entries):
        stage = _stage(entry, f"plan.stages[{i}]")
        expected = stages[-1].layers[1] if stages else 0
        if stage.layers[0] != expected:
            raise UserError(f"plan.stages[{i}].layers begins at {stage.layers[0]}, but must begin at {expected}.")
        stages.append(stage)
    return tuple(stages)


def _stage(obj: Any, path: str) -> Stage:
    reading.keys(obj, path, _names(Stage))
    first, last = (
        reading.integer(value, f"{path}.layers[{i}]", low=0)
        for i, value in enumerate(reading.items(obj["layers"], f"{path}.layers", length=2))
    )
    if last <= first:
        raise UserError(f"{path}.layers is [{first}, {last}], but must hold at least one layer; leave the stage out.")
    widths = reading.items(obj["bits"], f"{path}.bits", length=last - first)
    parts = reading.keys(obj["memory_bytes"], f"{path}.memory_bytes", MEMORY_PARTS)
    return Stage(
        rank=reading.integer(obj["rank"], f"{path}.rank", low=0),
        host=_text_or_null(obj["host"], f"{path}.host"),
        device=reading.text(obj["device"], f"{path}.device"),
        device_type=reading.text(obj["device_type"], f"{path}.device_type"),
        layers=(first, last),
        bits=tuple(reading.integer(width, f"{path}.bits[{i}]") for i, width in enumerate(widths)),
        kernel=_text_or_null(obj["kernel"], f"{path}.kernel"),
        memory_bytes={name: reading.number(parts[name], f"{path}.memory_bytes.{name}") for name in MEMORY_PARTS},
        memory_budget_bytes=reading.number(obj["memory_budget_bytes"], f"{path}.memory_budget_bytes"),
        prefill_seconds=reading.number(obj["prefill_seconds"], f"{path}.prefill_seconds"),
        decode_seconds=reading.number(obj["decode_seconds"], f"{path}.decode_seconds"),
    )


def _plain(value: Any) -> Any:
    """Tuples as lists and mappings as dicts, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
