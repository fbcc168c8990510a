"""lm-evaluation-harness on the pipeline engine: a model class of its own, and tasks that may come from local files.

Needs the extra: `pip install ds_llmpq[eval]`.
"""

from __future__ import annotations

from typing import Any

from ds_llmpq.errors import UserError
from ds_llmpq.evaluation.job import ScoreJob
from ds_llmpq.evaluation.rows import ScoredRow
from ds_llmpq.evaluation.scoring import ScoringSession
from ds_llmpq.launch.progress import ProgressLines
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
    """Scores what the harness asks for through a `ScoringSession`, on the driver of a running pipeline."""

    def __init__(self, session: ScoringSession, tokenizer: Any, max_length: int):
        super().__init__()
        self.session = session
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
        rows = []
        for _, context, continuation in requests:
            tokens = (list(context) + list(continuation))[-(self.max_length + 1) :]
            rows.append(ScoredRow.of(tokens, scored=min(len(continuation), len(tokens) - 1)))
        # rows of like length share micro-batches without padding
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].prompt))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        progress = ProgressLines()
        for done, score in enumerate(self.session.scores([rows[index] for index in order])):
            found[order[done]] = (sum(score.logprobs), all(score.greedy))
            progress.show("score", done + 1, len(rows))
        return found

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


def run_tasks(job: ScoreJob, session: ScoringSession) -> dict[str, Any]:
    """The harness's results for the job's tasks. `UserError` for a task it does not know."""
    settings = job.evaluation
    tokenizer = load_tokenizer(job.model_path, job.trust_remote_code)
    length = read_shape(job.model_path).max_positions or 2048
    manager = TaskManager(include_path=settings.tasks_path, include_defaults=settings.tasks_path is None)
    unknown = [task for task in settings.tasks if not manager.match_tasks([task])]
    if unknown:
        where = settings.tasks_path or "lm-evaluation-harness"
        raise UserError(f"Task {unknown[0]!r} is not known in {where}; name a task by its `task:` key.")
    found = simple_evaluate(
        model=PipelineLM(session, tokenizer, length),
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
