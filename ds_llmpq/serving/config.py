"""The keys that planning and running read: those of `plan`, `run`, `evaluate` and `serve`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.cluster.config import ClusterConfig
from ds_llmpq.engine.config import ComputeConfig, EngineConfig
from ds_llmpq.evaluation.config import EvaluationConfig
from ds_llmpq.fields import path_field
from ds_llmpq.launch.config import SupervisionConfig, WatchConfig
from ds_llmpq.models.config import ModelConfig
from ds_llmpq.planner.config import CostConfig, PlannerConfig, WorkloadConfig
from ds_llmpq.quant.config import QuantConfig


@dataclass
class PlanningConfig:
    """The groups that determine a plan, for all commands that make one."""

    out: str = path_field("")
    model: ModelConfig = field(default_factory=ModelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    cluster_file: str | None = path_field()  # a cluster.yaml, as `detect` writes it, instead of the group's entry
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    engine: ComputeConfig = field(default_factory=ComputeConfig)


@dataclass
class PlanConfig(PlanningConfig):
    """Everything that is read to make a plan."""

    batch: BatchConfig = field(default_factory=BatchConfig)
    input: str | None = path_field()  # sizes what the workload leaves open
    problem: str | None = path_field()  # solve this problem.json instead of building one
    check: str | None = path_field()  # validate and cost this plan.json instead of solving

    @classmethod
    def of(cls, settings: PlanningConfig) -> PlanConfig:
        """The settings with which `run` or `evaluate` plans: its groups, and defaults for keys that it does not
        have."""
        taken = {entry.name for entry in fields(cls)} & {entry.name for entry in fields(settings)}
        return cls(**{name: getattr(settings, name) for name in taken})


@dataclass
class RunConfig(PlanningConfig):
    """`ds-llmpq run`: plans if no plan is given, starts the launcher, waits, and sums up. With the same out=DIR again,
    it resumes."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    input: str | None = path_field()
    plan: str | None = path_field()
    quantized: str | None = path_field()  # folder of `ds-llmpq quantize` for this plan, from which layers are read
    hostfile: str | None = path_field()  # null: written from the plan
    resume: str = "auto"  # auto: refuse if what results depend on has changed | force: resume whatever has changed
    run: SupervisionConfig = field(default_factory=SupervisionConfig)
    verbose: bool = False  # (-v) print the whole plan with its notes, and each stage's memory and time


@dataclass
class EvaluateConfig(PlanningConfig):
    """`ds-llmpq evaluate`: the quality of a plan, scored on its pipeline, predicted against measured."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    plan: str | None = path_field()
    quantized: str | None = path_field()  # folder of `ds-llmpq quantize` for this plan
    run: WatchConfig = field(default_factory=WatchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass
class ServeConfig:
    """`ds-llmpq serve`: one rank of a plan's pipeline, started by the deepspeed launcher."""

    plan: str = path_field("")
    input: str = path_field("")
    output: str = path_field("")  # folder of results.jsonl, errors.jsonl, metrics.json and trace.json
    quantized: str | None = path_field()  # folder of `ds-llmpq quantize` on this host, instead of the model's
    model: ModelConfig = field(default_factory=ModelConfig)  # path: where the model lies on this host, if elsewhere
    engine: EngineConfig = field(default_factory=EngineConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
