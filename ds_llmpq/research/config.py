"""Configuration of `ds-llmpq simulate` and its groups, and what `ds-llmpq plan` takes to reproduce papers."""

from __future__ import annotations

from dataclasses import dataclass, field

from ds_llmpq.errors import UserError
from ds_llmpq.fields import path_field

_PUBLISHED_ON = {"opt_13b": (1, 2), "opt_30b": (3, 4, 9), "opt_66b": (5, 6, 10), "bloom_176b": (7, 8, 11)}
# cluster of the published evaluation -> the model it was evaluated with
PUBLISHED_MODELS = {f"cluster{number}": model for model, numbers in _PUBLISHED_ON.items() for number in numbers}


def find_published_model(cluster: str) -> str:
    """Resolver of `${published_model:CLUSTER}`."""
    if cluster not in PUBLISHED_MODELS:
        raise UserError(f"cluster={cluster} was not published with a model; give model=NAME too.")
    return PUBLISHED_MODELS[cluster]


@dataclass
class AblationConfig:
    """Simplified planners to compare with."""

    variant: str = "full"  # full | phase_blind | equal_micro_batches | grouped
    group_layers: int = 1  # variant=grouped: layers that are decided together
    objective: str = "pipeline"  # pipeline | reference (LLM-PQ's published latency, without a bound)


@dataclass
class ArrivalsConfig:
    """When jobs arrive."""

    kind: str = "poisson"  # poisson | gamma | uniform | together | trace
    rate: float = 0.2  # jobs a second
    load: float | None = None  # instead of rate: share of what the slots could do if none were ever padded or empty
    cv: float = 1.0  # gamma: coefficient of variation of the gaps
    trace: str | None = path_field()  # file with the columns TIMESTAMP, ContextTokens, GeneratedTokens
    start_row: int = 0
    scale: float = 1.0  # stretches the trace's gaps


@dataclass
class AnswersConfig:
    """Lengths of prompts and answers."""

    kind: str = "lognormal"  # lognormal | data | trace (the trace's own lengths)
    median_tokens: float = 110.0
    sigma: float = 1.2  # of the logarithm
    max_tokens: int = 512
    prompt_median_tokens: float = 100.0
    prompt_sigma: float = 1.0
    data: str | None = path_field()  # JSON lines with output_tokens, also prompt_tokens and predicted_tokens if known


@dataclass
class PredictionConfig:
    """What the scheduler knows about lengths."""

    kind: str = "classes"  # oracle | noisy | classes | constant | data (the file's predicted_tokens)
    sigma: float = 0.65  # noise on the logarithm of the length; about 60 % of the classes are then right
    percentiles: list[float] = field(default_factory=lambda: [25, 50, 75, 99])  # class boundaries
    latency_seconds: float = 0.0  # charged per job


@dataclass
class ExecutionConfig:
    """How long execution takes."""

    kind: str = "constant"  # constant | plan
    constant_seconds: float = 0.1
    per_token_seconds: float = 0.02
    plan: str | None = path_field()  # plan.json whose stage times are used


@dataclass
class GuardConfig:
    """Protection from starvation: aging | overdue | none; null switches a bound off."""

    kind: str = "aging"
    threshold_seconds: float | None = 300.0
    coefficient: float | None = 30.0


@dataclass
class SimulateConfig:
    """`ds-llmpq simulate`: runs the same jobs under several policies."""

    out: str = path_field("")
    mode: str = "right"  # right | reference (the published simulator, on the cases in a file)
    cases: str | None = path_field()
    policies: list[str] = field(default_factory=lambda: ["fcfs", "ssjf", "sjf"])
    batching: str = "none"  # none | static | dynamic | continuous
    max_batch: int = 4  # slots, unless batching=none
    batch_wait_seconds: float = 0.0  # how long a partial static or dynamic batch waits to fill
    jobs: int = 1000
    repeats: int = 5  # with seeds seed, seed + 1, ...
    seed: int = 0
    published: bool = False  # also measure as the published evaluation did, on 50 jobs per repeat
    arrivals: ArrivalsConfig = field(default_factory=ArrivalsConfig)
    answers: AnswersConfig = field(default_factory=AnswersConfig)
    prediction: PredictionConfig = field(default_factory=PredictionConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
