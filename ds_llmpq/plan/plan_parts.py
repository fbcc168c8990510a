"""What a plan consists of: each dataclass is a part of the schema of `plan.json`."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated

from annotated_types import Ge, Le

from ds_llmpq.cluster.devices import COMPUTE_DTYPES, KINDS
from ds_llmpq.integers import round_up
from ds_llmpq.quant.config import ZEROS, QuantConfig
from ds_llmpq.validation import (
    Amount,
    Bits,
    Count,
    LayerBits,
    Many,
    Name,
    PathText,
    Positive,
    PossiblyInfinite,
    Some,
    Table,
    one_of,
)
from ds_llmpq.wording import format_number

MEMORY_PARTS = ("weights", "kv", "embed", "head", "workspace")


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
    kv_bits: one_of(8, 16) = 16
    zeros: one_of("auto", *ZEROS) = "auto"

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
