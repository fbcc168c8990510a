"""The configuration of each command: the groups it reads, and keys of its own.

Hydra composes YAML into these dataclasses. `ds_llmpq.config` turns the result into plain objects at once, so that
nothing else in the package sees an OmegaConf node. The dataclass of a group is in `config.py` of the package that reads
it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.cluster.config import ClusterConfig
from ds_llmpq.engine.config import ComputeConfig
from ds_llmpq.fields import path_field
from ds_llmpq.models.config import ModelConfig
from ds_llmpq.planner.config import MicroBatchesConfig, WorkloadConfig
from ds_llmpq.profiling.config import ProfilingConfig
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.research.config import AblationConfig
from ds_llmpq.sensitivity.config import CalibrationConfig
from ds_llmpq.serving.config import PlanConfig


@dataclass
class DetectConfig:
    """`ds-llmpq detect`: describes this machine, or the hosts of a hostfile, as a cluster."""

    out: str = path_field("")
    hostfile: str | None = path_field()  # several hosts: lines `host slots=N`, each asked over ssh for N devices
    timeout_seconds: float = 120.0  # for the answer of each
    host: str = "localhost"  # the name other hosts and the hostfile use for this one
    cpu_stages: int | None = None  # CPU devices to offer; null: one if there is no GPU
    measure: bool = True  # measure memory bandwidth and matrix rates of the CPU, about two seconds
    # another host's GPUs: a saved `nvidia-smi --query-gpu=... --format=csv` (docs/guide.md)
    gpus: str | None = path_field()
    topology: str | None = path_field()  # its links: a saved `nvidia-smi topo -m`


@dataclass
class MergeConfig:
    """`ds-llmpq merge FILE FILE ...`: the hosts of several cluster files as one cluster."""

    out: str = path_field("")
    files: list[str] = field(default_factory=list)
    name: str = "merged"


@dataclass
class PlanCommandConfig(PlanConfig):
    """`ds-llmpq plan`: decides which device runs which layers, at which bit widths."""

    ablation: AblationConfig = field(default_factory=AblationConfig)


@dataclass
class ProfiledSizesConfig:
    """The part of the planner's group that `profile` reads."""

    micro_batches: MicroBatchesConfig = field(default_factory=MicroBatchesConfig)


@dataclass
class ProfileConfig:
    """`ds-llmpq profile`: times the parts of a model on this host's device types. An interrupted profile resumes."""

    out: str = path_field("")
    model: ModelConfig = field(default_factory=ModelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    cluster_file: str | None = path_field()
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    planner: ProfiledSizesConfig = field(default_factory=ProfiledSizesConfig)
    engine: ComputeConfig = field(default_factory=ComputeConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    input: str | None = path_field()  # sizes what the workload leaves open
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    force: bool = False  # start over if out=DIR holds a profile made with another version or setting


@dataclass
class ReportConfig:
    """`ds-llmpq report run=DIR`, `sweep=DIR` or `fidelity profile=DIR`: pages, pictures and tables."""

    out: str = path_field("")
    what: str | None = None  # run | sweep | fidelity; null: what the folder's key says
    run: str | None = path_field()  # folder of a run, or of a plan
    sweep: str | None = path_field()  # folder of a multirun
    profile: str | None = path_field()  # folder of a profile


@dataclass
class ExportConfig:
    """`ds-llmpq export`: a plan as arguments and configuration of another system."""

    out: str = path_field("")
    plan: str = path_field("")
    to: str = ""  # vllm | llama_cpp | deepspeed


@dataclass
class QuantizeConfig:
    """`ds-llmpq quantize`: writes the model with each decoder layer at its width, for `run quantized=DIR`."""

    out: str = path_field("")
    model: ModelConfig = field(default_factory=ModelConfig)
    plan: str | None = path_field()  # plan.json: its widths, HQQ settings and model
    widths: list[int] | None = None  # instead of a plan: one width for all layers, or one per layer
    quant: QuantConfig = field(default_factory=QuantConfig)
    reuse: str | None = path_field()  # another folder of quantize, whose equal layers are copied
    device: str = "cpu"  # where layers are quantized: cpu, cuda, cuda:1


@dataclass
class SensitivityConfig:
    """`ds-llmpq sensitivity`: what each layer loses at each width, as sensitivity.json. A killed command resumes."""

    out: str = path_field("")
    model: ModelConfig = field(default_factory=ModelConfig)
    method: str = "variance"  # variance | hessian | random | measured
    quant: QuantConfig = field(default_factory=QuantConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    seed: int = 0
    device: str = "cpu"  # cpu, cuda, cuda:1
