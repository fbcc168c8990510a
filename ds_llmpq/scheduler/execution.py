"""What running jobs costs in a simulation: a constant and a time per token, or the stage times of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ds_llmpq.errors import UserError
from ds_llmpq.plan import Plan


class ExecutionCost(Protocol):
    """A job first pays `own_steps` decode steps in its own slot and holds up its whole batch for `stall_seconds`."""

    def own_steps(self, prompt_tokens: int) -> float:
        """Decode steps' worth of time before a job's first token, in its slot alone."""

    def stall_seconds(self, prompt_tokens: Sequence[int]) -> float:
        """Time for which all rows stand still when jobs with these prompts start."""

    def decode_seconds(self, rows: int, context_tokens: int, steps: float) -> float:
        """`steps` tokens for each of `rows` rows whose contexts sum to `context_tokens` at first; rises with steps."""


@dataclass(frozen=True)
class ConstantCost:
    """The SSJF paper's: `constant_seconds` a job, `per_token_seconds` a token, whatever the batch."""

    constant_seconds: float = 0.1
    per_token_seconds: float = 0.02

    def __post_init__(self) -> None:
        if not self.per_token_seconds > 0 or not self.constant_seconds >= 0:
            raise UserError(
                f"execution.per_token_seconds is {self.per_token_seconds} and execution.constant_seconds is "
                f"{self.constant_seconds}, but the first must be above 0 and the second not negative."
            )

    def own_steps(self, prompt_tokens: int) -> float:
        # rounded: 0.1 / 0.02 must be 5 steps, not a hair more
        return round(self.constant_seconds / self.per_token_seconds, 9)

    def stall_seconds(self, prompt_tokens: Sequence[int]) -> float:
        return 0.0

    def decode_seconds(self, rows: int, context_tokens: int, steps: float) -> float:
        return steps * self.per_token_seconds


@dataclass(frozen=True)
class PlanCost:
    """Stage times of a plan: P_j and D_j of one micro-batch, composed as the pipeline runs them; links are left out.

    Prefill: sum_j P_j + (m_p - 1) max_j P_j with m_p = ceil(rows / eta), P_j scaled by longest / planned prompt.
    A decode step: max(m_d max_j D_j, sum_j D_j) with m_d = ceil(rows / xi).
    """

    prefill_seconds: tuple[float, ...]
    decode_stage_seconds: tuple[float, ...]
    prefill_micro_batch: int
    decode_micro_batch: int
    planned_prompt_tokens: int

    @classmethod
    def from_plan(cls, plan: Plan) -> PlanCost:
        return cls(
            tuple(stage.prefill_seconds for stage in plan.stages),
            tuple(stage.decode_seconds for stage in plan.stages),
            plan.micro_batch.prefill,
            plan.micro_batch.decode,
            plan.workload.prefill_tokens,
        )

    def own_steps(self, prompt_tokens: int) -> float:
        return 0.0

    def stall_seconds(self, prompt_tokens: Sequence[int]) -> float:
        micro_batches = -(-len(prompt_tokens) // self.prefill_micro_batch)
        full = sum(self.prefill_seconds) + (micro_batches - 1) * max(self.prefill_seconds)
        return full * max(prompt_tokens) / self.planned_prompt_tokens

    def decode_seconds(self, rows: int, context_tokens: int, steps: float) -> float:
        micro_batches = -(-rows // self.decode_micro_batch)
        return steps * max(micro_batches * max(self.decode_stage_seconds), sum(self.decode_stage_seconds))


def estimate_alone(cost: ExecutionCost, prompt_tokens: int, generated_tokens: float) -> float:
    """How long a job takes with the machine to itself."""
    steps = cost.own_steps(prompt_tokens) + generated_tokens
    return cost.stall_seconds([prompt_tokens]) + cost.decode_seconds(1, prompt_tokens, steps)
