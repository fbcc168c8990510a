"""Configuration groups `workload`, `planner` and `cost`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ds_llmpq.fields import path_field


@dataclass
class WorkloadConfig:
    """What the plan is made for: B sequences in flight, s prompt tokens, n generated tokens each."""

    # null: from the first rows of the input file (longest prompt; longest answer, or what batch.predictor expects),
    # else 32, 512 and 100
    sequences: int | None = None
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    # of each prompt, a prefix that is computed and held once (engine.share_prefix); null: as the first rows of the
    # input file have it where another number is measured on them, else 0
    shared_tokens: int | None = None
    # cache positions of the longest request whose prompt does not begin with that prefix, if slots shall hold it too;
    # null: measured with shared_tokens, else 0 (all begin with it)
    unshared_tokens: int | None = None
    # with engine.kv_cache=paged, cache positions that all sequences share; null: sequences times what one needs on
    # average, measured as shared_tokens is, else enough for the longest of each
    pool_positions: int | None = None
    # of the requests, the share whose tokens are drawn (a temperature above 0), which costs time; null: as the first
    # rows of the input file have it, without one 0
    drawn_share: float | None = None

    @property
    def prefill_tokens(self) -> int:
        """Those of a prompt that its own prefill computes."""
        return self.prompt_tokens - (self.shared_tokens or 0)


@dataclass
class MicroBatchesConfig:
    """Candidate micro-batch sizes; null: powers of two up to the workload's sequences."""

    prefill: list[int] | None = None
    decode: list[int] | None = None


@dataclass
class PlannerConfig:
    mode: str = "theta"  # theta | max_quality_loss | max_latency | pareto (the front of both)
    theta: float = 1.0  # seconds per nat of predicted loss increase
    # the most nats per token that a plan may be expected to lose, in the modes theta and max_quality_loss; null: any
    max_quality_loss: float | None = 0.02
    # layers stay at 16 bits where quantizing some is not faster by this share, and all where it is not faster by more
    # than measured times are off; 0: whatever is fastest
    least_gain: float = 0.01
    max_latency_seconds: float | None = None
    solver: str = "auto"  # auto | gurobi | highs | search
    # the fewest devices, or where the cluster has prices the cheapest, on which all rows of the input, without one the
    # planned sequences, end within so many seconds
    deadline_seconds: float | None = None
    time_limit_seconds: float = 30.0
    gap: float = 0.01
    seed: int = 0
    # another method's plan instead, to run and compare: uniform | pipeedge | adabits | llmpq_heuristic |
    # memory_proportional | single_device; flexgen, flexgen_int8 are estimates without a plan
    baseline: str | None = None
    device_order: str = "free"  # free | fixed
    # decisions made already, for the solver to respect: order [device, ...], layers {device: [first, last)},
    # bits {layer: width}, micro_batch {phase: size}
    pins: dict[str, Any] = field(default_factory=dict)
    micro_batches: MicroBatchesConfig = field(default_factory=MicroBatchesConfig)
    sensitivity: str | None = path_field()  # sensitivity.json; null: a prior from published perplexities
    profile: str | None = path_field()  # folder of `ds-llmpq profile` (or its profile.csv); null: roofline times
    # without a profile: auto times a few layers of a model on the cluster's own devices, on other hosts over ssh, once;
    # always | never
    calibrate: str = "auto"
    profile_force: bool = False  # use it even where it was made with other library versions or settings


@dataclass
class CostConfig:
    """Where layer times come from."""

    # auto (planner.profile, else roofline) | roofline | published (`plan` alone: the paper's GPUs and kernels)
    source: str = "auto"
    # with source=roofline: plan for this kernel, also where none is installed (openvino, humming, fused); null:
    # quant.kernel
    kernel: str | None = None
