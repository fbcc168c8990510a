"""What planning and running read; the commands `plan` and `run`, and those that do more, take these keys."""

from __future__ import annotations

from dataclasses import dataclass, field

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.cluster.config import ClusterConfig
from ds_llmpq.engine.config import EngineConfig
from ds_llmpq.launch.config import SupervisionConfig
from ds_llmpq.models.config import ModelConfig
from ds_llmpq.planner.config import CostConfig, PlannerConfig, WorkloadConfig
from ds_llmpq.quant.config import QuantConfig


@dataclass
class PlanConfig:
    """`ds-llmpq plan`: decides who runs what, at which widths."""

    out: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    cluster_file: str | None = None  # a cluster.yaml, as `detect` writes it, instead of the group's entry
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    input: str | None = None  # sizes the workload where it is not given
    problem: str | None = None  # solve this problem.json instead of building one
    check: str | None = None  # validate and cost this plan.json instead of solving


@dataclass
class RunConfig(PlanConfig):
    """`ds-llmpq run`: plans if no plan is given, starts the launcher, waits, and sums up. Again with the same out=DIR,
    it goes on where it stopped."""

    plan: str | None = None
    quantized: str | None = None  # folder of `ds-llmpq quantize` for this plan: layers are read as stored there
    hostfile: str | None = None  # null: written from the plan
    resume: str = "auto"  # auto: refused if what results depend on has changed | force: go on whatever changed
    run: SupervisionConfig = field(default_factory=SupervisionConfig)
