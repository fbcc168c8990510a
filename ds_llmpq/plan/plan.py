"""`plan.json`, schema 2: what was decided, what it is predicted to cost, and how far from the optimum it can be.

`Plan.to_json` and `Plan.from_json` are inverse; `from_json` raises a `UserError` for a mistake. The dataclasses are the
schema, which `ds_llmpq.validation` reads; conditions on several fields together are checked here.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ds_llmpq.errors import UserError, quote
from ds_llmpq.plan.assignment import Assignment, StageAssignment
from ds_llmpq.plan.plan_parts import (
    Deployment,
    MicroBatches,
    PassTimes,
    PlannedModel,
    PredictedTotals,
    Quantization,
    SolverReport,
    Stage,
    Workload,
)
from ds_llmpq.plan.schema1 import upgrade
from ds_llmpq.quant.config import rename_former
from ds_llmpq.quant.kernels.registry import check_batch_invariant, find_stage_kernel
from ds_llmpq.validation import (
    Amount,
    Many,
    Note,
    Number,
    Plain,
    Some,
    Table,
    validate,
)

SCHEMA = 2
FORMER_SCHEMA = 1
MOST_LAYERS = 10_000  # of a model
ESTIMATES = {"flexgen": 16, "flexgen_int8": 8}  # baselines that are no plans, and their bit widths
BASELINES = ("uniform", "memory_proportional", "single_device", "adabits", "pipeedge", *ESTIMATES)  # of every plan
REMEDY = "correct it, or plan again"


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
    run_seconds: Amount | None = None  # of the workload, simulated as a run's verdict has it; None: too many passes
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
    def kv_bits(self) -> int:
        return (self.quant or Quantization()).kv_bits

    @property
    def cache_block(self) -> int:
        """Positions per block of the KV cache; the same for all stages, because they share slots."""
        return max(find_stage_kernel(stage.kernel).block_positions(self.is_paged) for stage in self.stages)

    @property
    def is_ragged(self) -> bool:
        """Whether passes take rows of any lengths at any positions, since every stage is one graph."""
        return all(find_stage_kernel(stage.kernel).whole_stage for stage in self.stages)

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

    def check_batch_invariant(self, asked: bool) -> None:
        """`UserError` if `engine.batch_invariant` is asked for, and the plan cannot have it."""
        for stage in self.stages:
            check_batch_invariant(find_stage_kernel(stage.kernel), asked)
        check_shared_cache(self.is_paged, asked)

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
        expected = last
    links = plan.deployment and plan.deployment.link_seconds
    for phase in ("prefill", "decode") if links else ():
        if len(getattr(links, phase)) != len(plan.stages):
            raise UserError(f"plan.deployment.link_seconds.{phase} must have {len(plan.stages)} entries; plan again.")


def check_shared_cache(paged: bool, batch_invariant: bool) -> None:
    """`UserError`: sequences are to share the KV cache, and answers not to depend on which others run."""
    if paged and batch_invariant:
        raise UserError(
            "engine.batch_invariant=true cannot be had with engine.kv_cache=paged, where it depends on the other "
            "sequences how many rows a pass has; plan with engine.kv_cache=slots."
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
