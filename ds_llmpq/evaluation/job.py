"""What every rank of an evaluation is told. Imports no torch: the launching process makes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ds_llmpq.engine.config import EngineConfig
from ds_llmpq.evaluation.config import EvaluationConfig
from ds_llmpq.plan import Plan
from ds_llmpq.serving.job import from_token, to_token

_PLAIN = ("model_path", "output", "reference", "keeps_reference", "trust_remote_code", "hang_seconds")


@dataclass(frozen=True)
class ScoreJob:
    """Paths are absolute; `text` and `output` lie on rank 0's host. `reference` is a file on the last stage's host that
    holds what the unquantized model predicts: written (`keeps_reference`) or compared with; None: neither.
    """

    plan: Plan
    model_path: str
    output: str
    engine: EngineConfig
    evaluation: EvaluationConfig
    reference: str | None = None
    keeps_reference: bool = False
    trust_remote_code: bool = False
    hang_seconds: float | None = None  # a rank in which nothing moves for so long writes its stacks to the log

    def to_token(self) -> str:
        fields = {name: getattr(self, name) for name in _PLAIN}
        fields |= {"plan": self.plan.to_json(), "engine": asdict(self.engine), "evaluation": asdict(self.evaluation)}
        return to_token(fields)

    @classmethod
    def from_token(cls, token: str) -> ScoreJob:
        """`UserError` for what `to_token` has not made."""
        return from_token(cls, token, "start it through `ds-llmpq evaluate`")
