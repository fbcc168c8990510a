"""The shape of every configuration group.

Hydra composes YAML into these dataclasses; `OmegaConf.to_object` turns the result into plain objects once, at the
border (`ds_llmpq.config`), and nothing inside the package sees an OmegaConf node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    """Where the checkpoint is: a local folder in Hugging Face format (config.json, safetensors, tokenizer).

    `shape` describes a model without weights (Hugging Face config.json keys), enough to plan but not to run.
    """

    path: str | None = None
    shape: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False


@dataclass
class DeviceTypeConfig:
    """One kind of device. Rates are per device, in FLOP/s and bytes/s; `source` says where they come from."""

    kind: str = "cuda"  # cuda | cpu
    memory_bytes: int = 0  # usable by one process after the runtime context
    memory_bandwidth_bytes_per_second: float = 0.0
    # dense matrix rate by arithmetic type: float32, bfloat16, float16, int8; a missing type cannot be computed in
    flops_per_second: dict[str, float] = field(default_factory=dict)
    kernel_overhead_seconds: float = 0.0  # fixed cost of one decoder layer's launch
    bits: list[int] = field(default_factory=lambda: [2, 3, 4, 8, 16])  # widths its kernels can run
    compute_capability: str | None = None
    source: str = "datasheet"


@dataclass
class DeviceConfig:
    """One device of a host: `slot` is its index in the hostfile's slots (PCI order on GPUs)."""

    type: str = ""
    slot: int = 0
    memory_bytes: int | None = None  # overrides the type's
    threads: int | None = None  # CPU stages: threads given to the process
    cpu_share: float | None = None  # CPU stages: emulates a slower processor, e.g. 0.5; null: all of it


@dataclass
class HostConfig:
    name: str = "localhost"
    devices: list[DeviceConfig] = field(default_factory=list)


@dataclass
class LinkConfig:
    latency_seconds: float = 0.0
    bandwidth_bytes_per_second: float = 0.0


@dataclass
class LinkPairConfig:
    """An exception for one ordered pair of devices, named `host:slot`."""

    source: str = ""
    target: str = ""
    latency_seconds: float = 0.0
    bandwidth_bytes_per_second: float = 0.0


@dataclass
class LinksConfig:
    intra_host: LinkConfig = field(default_factory=LinkConfig)
    inter_host: LinkConfig = field(default_factory=LinkConfig)
    pairs: list[LinkPairConfig] = field(default_factory=list)
    source: str = "datasheet"


@dataclass
class ClusterConfig:
    name: str = ""
    device_types: dict[str, DeviceTypeConfig] = field(default_factory=dict)
    hosts: list[HostConfig] = field(default_factory=list)
    links: LinksConfig = field(default_factory=LinksConfig)
    # environment passed to every host, e.g. GLOO_SOCKET_IFNAME
    env: dict[str, str] = field(default_factory=dict)


@dataclass
class WorkloadConfig:
    """What the plan is made for: B sequences in flight, s prompt tokens, n generated tokens each."""

    # null: from the first rows of the input file (longest prompt; longest answer, or what batch.predictor expects),
    # else 32, 512 and 100
    sequences: int | None = None
    prompt_tokens: int | None = None
    generated_tokens: int | None = None


@dataclass
class QuantConfig:
    """HQQ settings. `bits` are the widths the planner may choose from; 16 means unquantized in the compute type."""

    bits: list[int] = field(default_factory=lambda: [3, 4, 8, 16])
    group_size: int = 64
    axis: int = 1  # groups run along the input dimension (1) or the output dimension (0)
    optimize: bool = True  # HQQ's own fine-tuning of scale and zero
    # what runs decoder layers: auto | dequantize (HQQ's own forward) | openvino_graph (a stage as one, unquantized
    # layers too) | openvino | torch_int4 | gemlite
    kernel: str = "auto"
    # widths at which all weights of a row are one group, e.g. [8]; the others keep group_size
    whole_rows: list[int] = field(default_factory=list)
    # width of the output matrix; 16: as it is, and one with the embedding where the model ties them
    head_bits: int = 16


@dataclass
class MicroBatchesConfig:
    """Candidate micro-batch sizes; null: powers of two up to the workload's sequences."""

    prefill: list[int] | None = None
    decode: list[int] | None = None


@dataclass
class PlannerConfig:
    mode: str = "theta"  # theta | max_quality_loss | max_latency | pareto (the front of both)
    theta: float = 1.0  # seconds per nat of predicted loss increase
    max_quality_loss: float | None = None
    max_latency_seconds: float | None = None
    objective: str = "pipeline"  # pipeline | reference
    solver: str = "auto"  # auto | gurobi | highs | search
    time_limit_seconds: float = 30.0
    gap: float = 0.01
    seed: int = 0
    device_order: str = "free"  # free | fixed
    # decisions made already, for the solver to respect: order [device, ...], layers {device: [first, last)},
    # bits {layer: width}, micro_batch {phase: size}
    pins: dict[str, Any] = field(default_factory=dict)
    micro_batches: MicroBatchesConfig = field(default_factory=MicroBatchesConfig)
    omega: str | None = None  # omega.json; null: a prior from published perplexities
    profile: str | None = None  # folder of `ds-llmpq profile` (or its profile.csv); null: roofline times
    profile_force: bool = False  # use it even where it was made with other library versions or settings
    variant: str = "full"  # full | phase_blind | equal_micro_batches | grouped | heuristic: lesser planners to compare
    group_layers: int = 1  # of variant=grouped: so many layers are decided at once


@dataclass
class CostConfig:
    """Where layer times come from."""

    source: str = "auto"  # auto (planner.profile, else roofline) | roofline | published (the paper's GPUs and kernels)
    # with source=roofline: plan for this kernel, also where it is not installed (gemlite, fused); null: quant.kernel
    kernel: str | None = None


@dataclass
class EngineConfig:
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16: arithmetic, KV cache and unquantized weights
    timeout_seconds: float = 1800.0  # a stage that hears nothing for so long gives up; loading counts
    master_port: int | None = None
    check_memory: bool = True  # before loading: is as much free on every device as the plan needs there
    refill: bool = True  # a finished sequence's slot takes the next request; false: a wave runs to its end
    # decode rounds that a free slot waits for others, to be refilled in one prefill pass; null: 8, but 0 where stages
    # are graphs, whose prefill costs the same a token for one row as for many
    patience_rounds: int | None = None
    # a request's greedy answer does not depend on which others it runs with: full decode micro-batches always, prefill
    # one by one
    batch_invariant: bool = False


@dataclass
class BatchConfig:
    """Defaults for what a request leaves out, and limits on input rows."""

    max_tokens: int = 128
    temperature: float = 0.0  # greedy: offline batches want repeatable answers
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False
    max_row_bytes: int = 4 * 1024 * 1024
    limit: int | None = None  # only the first so many requests
    # arrival | prompt_length | predicted_length | bucketed; null: predicted_length, or arrival in a replay
    order: str | None = None
    predictor: str | None = None  # folder of `lengths train`; null: a request's own limit stands for its length
    # cache positions reserved for an answer: by its own limit, or by the predictor's bound; what overruns is requeued
    admission: str = "worst_case"  # worst_case | q95 | q90
    replay: str | None = None  # trace: requests come at their rows' arrival_seconds, in the order of batch.policy
    policy: str = "fcfs"  # of a replay: fcfs | sjf (own limits as lengths) | ssjf | longest_first | prompt_length


@dataclass
class DetectConfig:
    """`ds-llmpq detect`: describes this machine as a cluster."""

    out: str = ""
    host: str = "localhost"  # the name other hosts and the hostfile use for this one
    cpu_stages: int | None = None  # CPU devices to offer; null: one if there is no GPU
    measure: bool = True  # measure memory bandwidth and matrix rates of the CPU, about two seconds
    gpus: str | None = None  # another host's GPUs: a saved `nvidia-smi --query-gpu=... --format=csv` (docs/guide.md)
    topology: str | None = None  # its links: a saved `nvidia-smi topo -m`


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
class ServeConfig:
    """`ds-llmpq serve`: one rank of a plan's pipeline, started by the deepspeed launcher."""

    plan: str = ""
    input: str = ""
    output: str = ""  # folder of results.jsonl, errors.jsonl, metrics.json and trace.json
    quantized: str | None = None  # folder of `ds-llmpq quantize` on this host, instead of the model's
    model: ModelConfig = field(default_factory=ModelConfig)  # path: where the model lies on this host, if elsewhere
    engine: EngineConfig = field(default_factory=EngineConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)


@dataclass
class SupervisionConfig:
    """What `run` does when something goes wrong while the pipeline runs."""

    restarts: int = 3  # starts again after a death, in a row that brought no new result
    backoff_seconds: float = 5.0  # pause before the first of them, doubled each time, at most 300
    hang_seconds: float = 900.0  # a pipeline in which nothing moves for so long is ended and counts as a death
    grace_seconds: float = 60.0  # after a first Ctrl-C or SIGTERM: for what is in flight; a second one ends at once
    on_loss: str = "stop"  # stop | replan: where a host or GPU does not come back, end, or plan on what is left


@dataclass
class RunConfig(PlanConfig):
    """`ds-llmpq run`: plans if no plan is given, starts the launcher, waits, and sums up. Again with the same out=DIR,
    it goes on where it stopped."""

    plan: str | None = None
    quantized: str | None = None  # folder of `ds-llmpq quantize` for this plan: layers are read as stored there
    hostfile: str | None = None  # null: written from the plan
    resume: str = "auto"  # auto: refused if what results depend on has changed | force: go on whatever changed
    run: SupervisionConfig = field(default_factory=SupervisionConfig)


@dataclass
class ProfilingConfig:
    """How long `profile` takes, and how finely it looks."""

    seconds: float = 200.0  # for all device types together, beside loading; the workload's own points come first
    rounds: int = 3  # passes over all points: a disturbance then hits one round of many points, not all of one
    links: bool = True  # also the links between this host's devices, and what a pass costs beside its layers
    chained_layers: int = 4  # decoder layers timed one after another, so that caches are as cold as in the engine


@dataclass
class ProfileConfig(PlanConfig):
    """`ds-llmpq profile`: times the parts of a model on this host's device types. An interrupted one goes on."""

    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    force: bool = False  # start over where out=DIR holds a profile made with another version or setting


@dataclass
class ReportConfig:
    """`ds-llmpq report run=DIR`, `sweep=DIR` or `fidelity profile=DIR`: pages, pictures and tables."""

    out: str = ""
    what: str | None = None  # run | sweep | fidelity; null: what the folder's key says
    run: str | None = None  # folder of a run, or of a plan
    sweep: str | None = None  # folder of a multirun
    profile: str | None = None  # folder of a profile


@dataclass
class ExportConfig:
    """`ds-llmpq export`: a plan as arguments and configuration of another system."""

    out: str = ""
    plan: str = ""
    to: str = ""  # vllm | llama_cpp


@dataclass
class QuantizeConfig:
    """`ds-llmpq quantize`: writes the model with each decoder layer at its width, for `run quantized=DIR`."""

    out: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    plan: str | None = None  # plan.json: its widths, HQQ settings and model
    widths: list[int] | None = None  # instead of a plan: one width for all layers, or one a layer
    quant: QuantConfig = field(default_factory=QuantConfig)
    reuse: str | None = None  # another folder of quantize whose equal layers are taken
    device: str = "cpu"  # where layers are quantized: cpu, cuda, cuda:1


@dataclass
class CalibrationConfig:
    """Text and effort of `sensitivity`. Memory: one layer, and rows x tokens x hidden size x 4 bytes a variant."""

    text: str | None = None  # a UTF-8 file; null: held-out source files of Python's standard library
    rows: int = 16
    tokens: int = 512  # a row
    rows_at_once: int = 4
    state_bytes: int = 1 << 30  # hidden states that may be held while variants of the model are measured
    hessian_rows: int = 4
    hessian_estimate: str = "eigenvalue"  # eigenvalue | trace


@dataclass
class SensitivityConfig:
    """`ds-llmpq sensitivity`: what each layer loses at each width, as omega.json. A killed one goes on (same out)."""

    out: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    method: str = "variance"  # variance | hessian | random | measured
    quant: QuantConfig = field(default_factory=QuantConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    seed: int = 0
    device: str = "cpu"  # cpu, cuda, cuda:1


@dataclass
class EvaluationConfig:
    """What `evaluate` measures: a text's perplexity against full precision, or tasks of lm-evaluation-harness."""

    text: str | None = None  # a UTF-8 file; null: held-out source files of Python's standard library
    row_tokens: int | None = None  # tokens a row; null: the model's positions, at most 1024
    limit_tokens: int | None = None  # only about so many tokens, in rows taken evenly from all of the text
    reference: bool = True  # also score the unquantized model: loss increase, KL, agreement
    reference_bytes: int = 1 << 30  # its distributions lie in a file meanwhile; KL covers as many tokens as fit
    tasks: list[str] | None = None  # instead of a text: names of lm-evaluation-harness tasks
    tasks_path: str | None = None  # folder of task files; null: the tasks that come with the harness
    fewshot: int | None = None
    limit_documents: int | None = None


@dataclass
class EvaluateConfig(RunConfig):
    """`ds-llmpq evaluate`: the quality of a plan, scored on its pipeline, predicted against measured."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
