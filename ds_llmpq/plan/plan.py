"""`plan.json`, schema 2: what was decided, what it is predicted to cost, and how far from the optimum it can be.

`Plan.to_json` and `Plan.from_json` are inverse; `from_json` raises a `UserError` for a mistake. The dataclasses are the
schema, which `ds_llmpq.validation` reads; conditions on several fields together are checked here.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

from annotated_types import Ge, Le

from ds_llmpq.cluster.devices import COMPUTE_DTYPES, KINDS
from ds_llmpq.errors import UserError, quote
from ds_llmpq.integers import round_up
from ds_llmpq.plan.assignment import Assignment, StageAssignment
from ds_llmpq.plan.schema1 import upgrade
from ds_llmpq.quant.config import QuantConfig, rename_former
from ds_llmpq.quant.kernels.base import Kernel
from ds_llmpq.quant.kernels.registry import find_stage_kernel
from ds_llmpq.validation import (
    Amount,
    Bits,
    Count,
    LayerBits,
    Many,
    Name,
    Note,
    Number,
    PathText,
    Plain,
    Positive,
    PossiblyInfinite,
    Some,
    Table,
    one_of,
    validate,
)
from ds_llmpq.wording import format_number

SCHEMA = 2
FORMER_SCHEMA = 1
MOST_LAYERS = 10_000  # of a model
MEMORY_PARTS = ("weights", "kv", "embed", "head", "workspace")
ESTIMATES = {"flexgen": 16, "flexgen_int8": 8}  # baselines that are no plans, and their bit widths
BASELINES = ("uniform", "memory_proportional", "single_device", "adabits", "pipeedge", *ESTIMATES)  # of every plan
REMEDY = "correct it, or plan again"


@dataclass(frozen=True)
class Workload:
    """A batch of B = `sequences`, each with s prompt tokens and n generated tokens. Prompts begin with the same
    `shared_tokens`, which are computed and held once. Those that do not need up to `unshared_tokens` cache positions;
    0: all do. `pool_positions`: cache positions that all sequences share block by block, so that each takes what its
    tokens need; 0: each has `row_positions` of its own."""

    sequences: Positive
    prompt_tokens: Positive
    generated_tokens: Positive
    shared_tokens: Count = 0
    unshared_tokens: Count = 0
    pool_positions: Count = 0

    @property
    def prefill_tokens(self) -> int:
        """Tokens of a prompt that its own prefill computes."""
        return self.prompt_tokens - self.shared_tokens

    def prefix_positions(self, block: int) -> int:
        """Cache positions of the prefix: only whole blocks are shared."""
        return self.shared_tokens // block * block

    def row_positions(self, block: int) -> int:
        """Cache positions of one sequence's own, in whole blocks: s + n, less the prefix, but so many that sequences
        without it fit."""
        whole = self.prompt_tokens + self.generated_tokens
        own = max(whole - self.prefix_positions(block), min(whole, self.unshared_tokens))
        return round_up(own, block)

    def cache_positions(self, block: int) -> int:
        """Cache positions of all sequences together, the prefix left out: of a pool at least those of the longest."""
        if not self.pool_positions:
            return self.sequences * self.row_positions(block)
        return round_up(max(self.pool_positions, self.row_positions(block)), block)


@dataclass(frozen=True)
class MicroBatches:
    """Sequences per micro-batch in each phase."""

    prefill: Positive
    decode: Positive


@dataclass(frozen=True)
class PlannedModel:
    """The model that a plan is for. `path` is None if only its shape was known."""

    path: PathText | None
    architecture: Name | None = None
    fingerprint: Name | None = None


@dataclass(frozen=True)
class Quantization:
    """The fields of a `QuantConfig`, frozen."""

    bits: Many[Bits] = (3, 4, 8, 16)
    group_size: Positive = 64
    axis: one_of(0, 1) = 1
    optimize: bool = True
    kernel: Name = "auto"
    per_channel_bits: Many[Bits] = ()
    lm_head_bits: Bits = 16

    @classmethod
    def from_config(cls, config: QuantConfig) -> "Quantization":
        return cls(**asdict(config) | {"bits": tuple(config.bits), "per_channel_bits": tuple(config.per_channel_bits)})

    def to_config(self) -> QuantConfig:
        return QuantConfig(**asdict(self) | {"bits": list(self.bits), "per_channel_bits": list(self.per_channel_bits)})


@dataclass(frozen=True)
class StageMemory:
    """Bytes that a stage holds, by part."""

    weights: Amount
    kv: Amount
    embed: Amount
    head: Amount
    workspace: Amount

    @property
    def total(self) -> float:
        return sum(self.by_part().values())

    def by_part(self) -> dict[str, float]:
        return {part: getattr(self, part) for part in MEMORY_PARTS}


@dataclass(frozen=True)
class PredictedTotals:
    """What a whole batch is predicted to cost."""

    latency_seconds: PossiblyInfinite
    prefill_seconds: PossiblyInfinite
    decode_seconds: PossiblyInfinite
    throughput_tokens_per_second: PossiblyInfinite
    quality_loss: PossiblyInfinite


@dataclass(frozen=True)
class PassTimes:
    """Seconds of a stage's passes of other sizes than the planned one: `seconds[i][j]` for `rows[i]` sequences of
    `tokens[j]` tokens each, new ones in prefill, cached ones in decode. Both ascend; between them times are linear."""

    rows: Some[Positive]
    tokens: Some[Count]
    seconds: Some[Some[Amount]]

    def interpolate(self, rows: float, tokens: float) -> float:
        """Seconds of a pass of this size. Beyond the last size, the slope stays the same."""
        by_rows = [_interpolate(self.tokens, seconds, tokens) for seconds in self.seconds]
        return max(0.0, _interpolate(self.rows, by_rows, rows))


def _interpolate(sizes: Sequence[float], values: Sequence[float], size: float) -> float:
    if len(sizes) == 1:
        return values[0]
    right = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
    share = (size - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: layers [first, last) with one bit width each, on one device.

    `prefill_seconds` and `decode_seconds` are P_j and D_j, for one micro-batch of the planned size. For passes of other
    sizes, see `prefill_times` and `decode_times`; the first pass of each number of tokens takes `first_pass_seconds`
    more. `host`, `kernel`, `kind`, `slot` and the times by size are None until the plan is deployed. Only CPU stages
    have `threads` and `cpu_share`.
    """

    rank: Count
    host: Name | None
    device: Name
    device_type: Name
    layers: tuple[Count, Count]
    bits: Many[LayerBits]
    kernel: Name | None
    memory_bytes: StageMemory
    memory_budget_bytes: Amount
    prefill_seconds: Amount
    decode_seconds: Amount
    kind: one_of(*KINDS) | None = None
    slot: Count | None = None
    threads: Positive | None = None
    cpu_share: Annotated[float, Ge(0.05), Le(1)] | None = None
    prefill_times: PassTimes | None = None
    decode_times: PassTimes | None = None
    first_pass_seconds: Amount = 0.0


@dataclass(frozen=True)
class SolverReport:
    """`bound` is proven: no plan has a smaller objective. `gap` = (objective - bound) / bound, None at a bound of 0.

    `status` is "optimal" (gap closed to the one asked for), "time_limit" or "interrupted" (incumbent and bound so
    far), "stalled" (nothing left to try that would raise the bound), "checked" (a plan given by hand, no bound), or
    "baseline" (another method's plan, no bound).
    """

    name: Name
    objective: Amount
    bound: Amount | None
    gap: Amount | None
    seconds: Amount
    status: Name

    @property
    def proof(self) -> str:
        """How far above the optimum the objective can be, in words; empty for a plan without a bound."""
        if self.bound is None:
            return ""
        return (
            "nothing proven yet"
            if self.gap is None
            else f"at most {format_number(100 * self.gap, 2)} % above the optimum"
        )


@dataclass(frozen=True)
class LinkSeconds:
    """Seconds of one micro-batch on each stage's link to the next; the last link leads back to the first stage."""

    prefill: Many[Amount]
    decode: Many[Amount]


@dataclass(frozen=True)
class Deployment:
    """What launching needs beside the stages. `env`: environment variables for every rank."""

    compute_dtype: one_of(*COMPUTE_DTYPES)
    env: Table[PathText] = field(default_factory=dict)
    link_seconds: LinkSeconds | None = None
    price_per_hour: Amount | None = None  # of the devices and hosts in use; None: no prices were given


@dataclass(frozen=True)
class Plan:
    """A complete plan. `baselines` maps a name to its predicted totals, or to the reason why it has no plan.
    `deployment` is None if the plan is solved but not deployed: it came from plain data and names no hosts."""

    model: PlannedModel | None
    workload: Workload
    stages: Some[Stage]
    micro_batch: MicroBatches
    predicted: PredictedTotals
    solver: SolverReport
    baselines: Mapping[str, PredictedTotals | str] = field(default_factory=dict)
    provenance: Table[Note] = field(default_factory=dict)
    explanation: Many[Note] = ()
    quant: Quantization | None = None
    deployment: Deployment | None = None
    quality_loss_interval: tuple[Number, Number] | None = None  # 95 % of other texts than the calibration's
    bits_per_weight: Amount | None = None  # of decoder layers and lm_head together, scales and zeros counted

    @property
    def is_deployed(self) -> bool:
        return self.deployment is not None

    def require_deployment(self) -> Deployment:
        """`UserError` for a plan that names no hosts."""
        if self.deployment is None:
            raise UserError("The plan names no hosts; plan with cluster=... instead of problem=...")
        return self.deployment

    def compute_cost(self, seconds: float, prompt_tokens: int, generated_tokens: int) -> dict[str, float | None] | None:
        """What so many seconds on the plan's devices cost: in total, per million generated tokens, and per million
        tokens including those of prompts. None if the cluster has no prices."""
        if self.deployment is None or self.deployment.price_per_hour is None:
            return None
        total = self.deployment.price_per_hour * seconds / 3600
        amounts = {"generated_tokens": generated_tokens, "tokens": prompt_tokens + generated_tokens}
        per_million = {f"per_million_{name}": 1e6 * total / count if count else None for name, count in amounts.items()}
        return {"price_per_hour": self.deployment.price_per_hour, "total": total, **per_million}

    @property
    def model_path(self) -> str | None:
        return self.model.path if self.model else None

    @property
    def lm_head_bits(self) -> int:
        return (self.quant or Quantization()).lm_head_bits

    @property
    def cache_block(self) -> int:
        """Positions per block of the KV cache; the same for all stages, because they share slots."""
        return max(find_stage_kernel(stage.kernel).cache_block for stage in self.stages)

    @property
    def row_positions(self) -> int:
        """The positions of the KV cache that one sequence takes for itself."""
        return self.workload.row_positions(self.cache_block)

    @property
    def cache_positions(self) -> int:
        """The tokens a layer's cache holds: those of all sequences in flight, and a shared prefix once."""
        return self.workload.cache_positions(self.cache_block) + self.workload.prefix_positions(self.cache_block)

    @property
    def is_paged(self) -> bool:
        """Whether sequences share the blocks of the KV cache."""
        return self.workload.pool_positions > 0

    def count_pool_blocks(self, prefix_tokens: int = 0) -> int:
        """Blocks that sequences share behind a prefix of so many tokens; 0 unless the plan is paged."""
        return (self.cache_positions - prefix_tokens) // self.cache_block if self.is_paged else 0

    def with_fewer_sequences(self) -> "Plan":
        """The same stages with half as many sequences in flight and in each micro-batch, at least one. The predictions
        stay those of the original plan."""
        sequences = max(1, self.workload.sequences // 2)
        rows = (max(1, min(size // 2, sequences)) for size in (self.micro_batch.prefill, self.micro_batch.decode))
        workload = replace(self.workload, sequences=sequences, pool_positions=-(-self.workload.pool_positions // 2))
        return replace(self, workload=workload, micro_batch=MicroBatches(*rows))

    def assignment(self) -> Assignment:
        """The decisions alone."""
        stages = tuple(StageAssignment(stage.device, *stage.layers, stage.bits) for stage in self.stages)
        return Assignment(stages, self.micro_batch.prefill, self.micro_batch.decode)

    def parts(self, before: int = 0, after: int = 0) -> list[int]:
        """Where a list of layers is cut into stages: stage j holds layers [parts[j], parts[j + 1]). The list has
        `before` layers (an embedding) ahead of the decoder layers and `after` ones (norm, lm_head) behind them, which
        go to the first and the last stage."""
        cuts = [stage.layers[0] + before for stage in self.stages[1:]]
        return [0, *cuts, before + self.stages[-1].layers[1] + after]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of `plan.json`."""
        return {"schema": SCHEMA, **to_plain(asdict(self))}

    @classmethod
    def from_json(cls, obj: Any) -> "Plan":
        """A plan from a parsed `plan.json`, also of the former schema. `UserError`: names the key, the value and the
        remedy."""
        obj = dict(validate(Plain, obj, "plan", REMEDY))
        if "schema" not in obj:
            raise UserError(f"plan lacks the key 'schema'; {REMEDY}.")
        schema = obj.pop("schema")
        if isinstance(schema, bool) or schema not in (FORMER_SCHEMA, SCHEMA):
            raise UserError(f"plan.schema is {quote(schema)}, but this version reads {FORMER_SCHEMA} and {SCHEMA}.")
        if schema == FORMER_SCHEMA:
            obj = upgrade(obj)
        if "quant" in obj:
            obj["quant"] = rename_former(obj["quant"])
        baselines = _baselines(obj.pop("baselines", {}))
        plan = replace(validate(cls, obj, "plan", REMEDY), baselines=baselines)
        _check_stages(plan)
        return plan


def _baselines(obj: Any) -> dict[str, PredictedTotals | str]:
    obj = validate(Plain, obj, "plan.baselines", REMEDY)
    reasons = {name: entry for name, entry in obj.items() if isinstance(entry, str)}
    totals = {name: entry for name, entry in obj.items() if name not in reasons}
    read = validate(Table[Note], reasons, "plan.baselines", REMEDY)
    read |= validate(Table[PredictedTotals], totals, "plan.baselines", REMEDY)
    return {name: read[name] for name in obj}


def _check_stages(plan: Plan) -> None:
    """`UserError`: the stages do not fit together, or a stage contradicts itself."""
    expected = 0
    for i, stage in enumerate(plan.stages):
        path, (first, last) = f"plan.stages[{i}]", stage.layers
        if first != expected:
            raise UserError(f"{path}.layers begins at {first}, but must begin at {expected}; {REMEDY}.")
        if last <= first:
            raise UserError(f"{path}.layers is [{first}, {last}], but must hold at least one layer; leave it out.")
        if len(stage.bits) != last - first:
            raise UserError(f"{path}.bits has {len(stage.bits)} entries, but must have {last - first}; {REMEDY}.")
        for name in ("prefill_times", "decode_times"):
            if (times := getattr(stage, name)) is not None:
                _check_times(times, f"{path}.{name}")
        if plan.is_deployed and (stage.kind is None or stage.slot is None):
            raise UserError(f"{path} lacks kind or slot, which a deployed plan needs; plan again.")
        if plan.is_paged and plan.is_deployed:
            require_block_tables(find_stage_kernel(stage.kernel), f"{path} runs")
        expected = last
    links = plan.deployment and plan.deployment.link_seconds
    for phase in ("prefill", "decode") if links else ():
        if len(getattr(links, phase)) != len(plan.stages):
            raise UserError(f"plan.deployment.link_seconds.{phase} must have {len(plan.stages)} entries; plan again.")


def require_block_tables(kernel: Kernel, what: str) -> None:
    """`UserError` unless attention reads the cache by block tables. `what`: who has the kernel."""
    if not kernel.whole_stage:
        raise UserError(
            f"engine.kv_cache=paged needs attention that reads block tables, as quant.kernel=openvino_graph has it, "
            f"but {what} kernel {kernel.name}; plan with engine.kv_cache=slots."
        )


def _check_times(times: PassTimes, path: str) -> None:
    for name in ("rows", "tokens"):
        sizes = getattr(times, name)
        if list(sizes) != sorted(set(sizes)):
            raise UserError(f"{path}.{name} is {list(sizes)}, but must ascend; {REMEDY}.")
    if len(times.seconds) != len(times.rows) or any(len(line) != len(times.tokens) for line in times.seconds):
        raise UserError(f"{path}.seconds must be {len(times.rows)} x {len(times.tokens)} numbers; {REMEDY}.")


def to_plain(value: Any) -> Any:
    """The value with lists for tuples and text for keys, as JSON has them."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(entry) for entry in value]
    return value
