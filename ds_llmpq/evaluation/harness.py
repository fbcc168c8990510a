"""Runs lm-evaluation-harness on the pipeline engine; tasks may come from local files.

Needs the extra: `pip install ds_llmpq[eval]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_llmpq.errors import UserError
from ds_llmpq.evaluation.config import EvaluationConfig
from ds_llmpq.evaluation.scoring import ScoringRounds, build_row
from ds_llmpq.models.shape import read_shape
from ds_llmpq.models.tokenizer import load_tokenizer

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise UserError("evaluation.tasks needs lm-evaluation-harness; install it with `pip install lm_eval`.") from None


@register_model("ds_llmpq")
class PipelineLM(TemplateLM):
    """Scores the harness's requests, on the driver of a running pipeline."""

    def __init__(self, rounds: ScoringRounds, tokenizer: Any, max_length: int, show: Callable[[str, int, int], None]):
        super().__init__()
        self.rounds = rounds
        self.show = show
        self.tokenizer = tokenizer
        self.max_length = max_length

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        asked = []
        for _, context, continuation in requests:
            tokens = (list(context) + list(continuation))[-(self.max_length + 1) :]
            asked.append((tokens, min(len(continuation), len(tokens) - 1)))
        # rows of similar length share micro-batches, to avoid padding
        order = sorted(range(len(asked)), key=lambda index: len(asked[index][0]))
        rows = [build_row(key, *asked[index]) for key, index in enumerate(order)]
        scores = dict(zip(order, self.rounds.score(rows, self.show), strict=True))
        return [(sum(scores[index].logprobs), all(scores[index].greedy)) for index in range(len(asked))]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(parts)))
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        raise UserError("Tasks that generate text are not supported; choose multiple-choice or perplexity tasks.")


def score_tasks(
    settings: EvaluationConfig,
    model_path: str,
    trust_remote_code: bool,
    rounds: ScoringRounds,
    show: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """The harness's results for `settings.tasks`. `UserError`: an unknown task."""
    tokenizer = load_tokenizer(model_path, trust_remote_code)
    length = read_shape(model_path).max_positions or 2048
    manager = TaskManager(include_path=settings.tasks_path, include_defaults=settings.tasks_path is None)
    unknown = [task for task in settings.tasks if not manager.match_tasks([task])]
    if unknown:
        where = settings.tasks_path or "lm-evaluation-harness"
        raise UserError(f"Task {unknown[0]!r} is not known in {where}; name a task by its `task:` key.")
    found = simple_evaluate(
        model=PipelineLM(rounds, tokenizer, length, show),
        tasks=list(settings.tasks),
        task_manager=manager,
        num_fewshot=settings.fewshot,
        limit=settings.limit_documents,
        bootstrap_iters=0,
        log_samples=False,
        random_seed=0,
        numpy_random_seed=0,
        torch_random_seed=0,
        fewshot_random_seed=0,
    )
    return {"tasks": found["results"], "documents": found["n-samples"]}
