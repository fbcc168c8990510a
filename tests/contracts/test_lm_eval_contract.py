"""Private and undocumented parts of lm-evaluation-harness."""

from types import SimpleNamespace

import pytest
from contract_checks import parameters, takes

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

LIBRARY = "lm_eval"
SEEN = ("0.4.11", "0.4.13")


def test_scores_are_asked_for_by_tokens():
    """`TemplateLM._loglikelihood_tokens(requests, ...)`, in evaluation/harness.py: what `loglikelihood` ends in, with a
    list of ((context, continuation), context's tokens, continuation's tokens)."""
    from ds_llmpq.evaluation.harness import PipelineLM

    asked = []

    class Recording(PipelineLM):
        def _loglikelihood_tokens(self, requests, **kwargs):
            asked.extend(requests)
            return [(0.0, True)] * len(requests)

    tokenizer = SimpleNamespace(
        eos_token_id=0, bos_token_id=None, bos_token=None, encode=lambda text, **_: [ord(letter) for letter in text]
    )
    model = Recording(None, tokenizer, 16, None)
    requests = [SimpleNamespace(args=("ab", "c")), SimpleNamespace(args=("", "de"))]
    assert model.loglikelihood(requests, disable_tqdm=True) == [(0.0, True)] * 2
    assert asked == [(("ab", "c"), [97, 98], [99]), (("", "de"), [0], [100, 101])]


def test_what_a_model_must_have():
    """`TemplateLM`, in evaluation/harness.py: nothing is abstract but what we define."""
    from ds_llmpq.evaluation.harness import PipelineLM

    assert not PipelineLM.__abstractmethods__


def test_windows_of_a_long_text():
    """`get_rolling_token_windows(token_list, prefix_token, max_seq_len, context_len)`, in evaluation/harness.py: yields
    (context, continuation), which overlap until `make_disjoint_window` has parted them."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    windows = get_rolling_token_windows(token_list=[1, 2, 3, 4], prefix_token=0, max_seq_len=3, context_len=1)
    parts = [make_disjoint_window(window) for window in windows]
    assert [part for _, continuation in parts for part in continuation] == [1, 2, 3, 4]
    assert parts[0][0] == [0]


def test_tasks_from_files(tmp_path):
    """`TaskManager(include_path, include_defaults).match_tasks(names)`, in evaluation/harness.py: names of the tasks in
    a folder of YAML files."""
    from lm_eval.tasks import TaskManager

    (tmp_path / "own.yaml").write_text("task: own\ndataset_path: json\noutput_type: multiple_choice\n")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    assert manager.match_tasks(["own"]) == ["own"]
    assert manager.match_tasks(["other"]) == []


def test_settings_of_an_evaluation():
    """`simple_evaluate(model, tasks, ...)`, in evaluation/harness.py: by these keywords."""
    from lm_eval import simple_evaluate

    takes(
        simple_evaluate, "model", "tasks", "task_manager", "num_fewshot", "limit", "bootstrap_iters", "log_samples",
        "random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed",
    )  # fmt: skip


def test_models_by_name():
    """`register_model("ds_llmpq")`, in evaluation/harness.py: a decorator that makes the class known and returns it."""
    from lm_eval.api.registry import get_model, register_model

    from ds_llmpq.evaluation.harness import PipelineLM

    assert parameters(register_model)[0] == "names"
    assert get_model("ds_llmpq") is PipelineLM
