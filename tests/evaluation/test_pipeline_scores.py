"""Scores through the launched pipeline against transformers with the same weights, and lm-evaluation-harness on it."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_llmpq.commands import evaluate
from ds_llmpq.config import asset
from ds_llmpq.engine.config import EngineConfig
from ds_llmpq.errors import UserError
from ds_llmpq.evaluation.config import EvaluationConfig, ScoringTask
from ds_llmpq.launch.attempt import run_attempt
from ds_llmpq.launch.launcher import Launch
from ds_llmpq.models.fingerprint import fingerprint
from ds_llmpq.plan import (
    Deployment,
    MicroBatches,
    Plan,
    PlannedModel,
    PredictedTotals,
    Quantization,
    SolverReport,
    Stage,
    StageMemory,
    Workload,
    write_plan,
)
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.pretrained import load_quantized
from ds_llmpq.quant.writer import write_quantized
from ds_llmpq.serving import evaluation_run
from ds_llmpq.serving.config import EvaluateConfig
from ds_llmpq.serving.job import Job, pack_token

pytestmark = [pytest.mark.slow, pytest.mark.launcher]
TINY = Path(asset("tiny-llama"))
LAYERS = 8
BITS = (3, 16, 4, 8, 2, 4, 16, 8)
CUTS = {1: [(0, 8)], 2: [(0, 3), (3, 8)], 3: [(0, 1), (1, 6), (6, 8)]}
HEAD_BITS = 4
QUANT = QuantConfig([2, 3, 4, 8, 16], 64, 1, True, lm_head_bits=HEAD_BITS)
TEXT = "\n".join(f"def function_{n}(argument):\n    '''Return {n}.'''\n    return argument + {n}\n" for n in range(60))


def make_plan(stages, bits=BITS, lm_head_bits=HEAD_BITS):
    zero = StageMemory(0.0, 0.0, 0.0, 0.0, 0.0)
    return Plan(
        model=PlannedModel(str(TINY), fingerprint=fingerprint(TINY)),
        workload=Workload(4, 64, 8),
        stages=tuple(
            Stage(rank, "localhost", f"localhost:{rank}", "cpu", layers, bits[slice(*layers)], None, zero,
                  0.0, 0.0, 0.0, kind="cpu", slot=rank, threads=1)
            for rank, layers in enumerate(CUTS[stages])
        ),
        micro_batch=MicroBatches(2, 2),
        predicted=PredictedTotals(0.25, 0.25, 0.25, 0.25, 0.25),
        solver=SolverReport("hand", 0.0, None, None, 0.0, "checked"),
        quant=replace(Quantization.from_config(QUANT), lm_head_bits=lm_head_bits),
        deployment=Deployment("float32"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    write_quantized(TINY, folder, list(BITS), QUANT)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


@torch.no_grad()
def reference_logprobs(model, rows):
    found = []
    for row in rows:
        logprobs = model(torch.tensor([row[:-1]])).logits[0].float().log_softmax(-1)
        found.append(logprobs)
    return found


def rows_of_text(length):
    tokens = AutoTokenizer.from_pretrained(TINY)(TEXT)["input_ids"]
    return [tokens[start : start + length + 1] for start in range(0, len(tokens) - 1, length)]


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_scores_equal_transformers(stages, quantized, text, tmp_path):
    """Full precision against the plan's widths, lm_head's too, as the command does it: perplexity, KL,
    agreement, loss increase."""
    plan_file, evaluation = tmp_path / "plan.json", EvaluationConfig(text=str(text), row_tokens=200)
    write_plan(plan_file, make_plan(stages))
    settings = EvaluateConfig(
        plan=str(plan_file), evaluation=evaluation, quantized=str(quantized) if stages > 1 else None
    )
    assert evaluate.run(settings, tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    rows = rows_of_text(200)
    targets = torch.tensor([token for row in rows for token in row[1:]])
    kept = torch.cat(reference_logprobs(load_quantized(quantized, torch.float32), rows))
    full = torch.cat(reference_logprobs(AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), rows))
    losses = [-logprobs.gather(-1, targets[:, None]).double().mean().item() for logprobs in (kept, full)]
    assert found["perplexity_per_token"] == pytest.approx(math.exp(losses[0]), rel=1e-4)
    assert found["reference"]["perplexity_per_token"] == pytest.approx(math.exp(losses[1]), rel=1e-4)
    assert found["perplexity_per_word"] == pytest.approx(
        math.exp(losses[0] * len(targets) / len(TEXT.split())), rel=1e-3
    )
    kl = (full.exp() * (full - kept)).sum(-1).double().mean().item()
    assert found["kl_nats_per_token"] == pytest.approx(kl, rel=1e-3)
    assert found["top1_agreement"] == pytest.approx(
        (full.argmax(-1) == kept.argmax(-1)).double().mean().item(), abs=0.002
    )
    increase = found["loss_increase"]
    assert increase["measured"] == pytest.approx(losses[0] - losses[1], abs=1e-5)
    assert increase["predicted"] == 0.25
    assert found["tokens"] == found["compared_tokens"] == len(targets)
    assert not (tmp_path / "out" / "reference.f32").exists()


def test_a_plan_that_quantizes_nothing_is_scored_once(text, tmp_path, monkeypatch, capsys):
    attempts = []
    monkeypatch.setattr(
        evaluation_run, "run_attempt", lambda launch, *rest: attempts.append(launch) or run_attempt(launch, *rest)
    )
    plan_file = tmp_path / "plan.json"
    write_plan(plan_file, make_plan(1, (16,) * LAYERS, lm_head_bits=16))
    evaluation = EvaluationConfig(text=str(text), row_tokens=200)
    assert evaluate.run(EvaluateConfig(plan=str(plan_file), evaluation=evaluation), tmp_path / "out") == 0
    assert len(attempts) == 1
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert found["reference"]["nats_per_token"] == found["nats_per_token"]
    assert found["loss_increase"]["measured"] == found["loss_increase"]["standard_error"] == 0
    assert "nothing is quantized" in capsys.readouterr().out


def test_harness_task_from_local_files_equals_the_harness_on_transformers(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    documents = [
        {
            "question": f"def add_{n}(value):\n    return value",
            "choices": [" + 1", " import", "\n\n", " def"],
            "answer": n % 4,
        }
        for n in range(12)
    ]
    (tasks / "questions.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tasks / "task.yaml").write_text(
        f"task: local_choice\ndataset_path: json\ndataset_kwargs:\n"
        f"  data_files: {{test: {tasks / 'questions.jsonl'}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "doc_to_choice: '{{choices}}'\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    plan_file = tmp_path / "plan.json"
    write_plan(plan_file, make_plan(2, (16,) * LAYERS, lm_head_bits=16))
    evaluation = EvaluationConfig(tasks=["local_choice"], tasks_path=str(tasks))
    assert evaluate.run(EvaluateConfig(plan=str(plan_file), evaluation=evaluation), tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "scores.json").read_text())["tasks"]["local_choice"]

    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(TINY), dtype="float32", device="cpu", batch_size=1, add_bos_token=True)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    expected = simple_evaluate(model, tasks=["local_choice"], task_manager=manager, bootstrap_iters=0)["results"]
    for metric in ("acc,none", "acc_norm,none"):
        assert found[metric] == expected["local_choice"][metric]


def test_a_mistake_on_a_rank_is_one_sentence(quantized, text, tmp_path):
    """Layers kept at other widths than the plan's: named before anything is scored."""

    plan_file = tmp_path / "plan.json"
    write_plan(plan_file, make_plan(1, (4,) * LAYERS))
    settings = EvaluateConfig(
        plan=str(plan_file),
        quantized=str(quantized),
        evaluation=EvaluationConfig(text=str(text), reference=False),
    )
    with pytest.raises(UserError, match="Layer 0 is kept at 3 bits"):
        evaluate.run(settings, tmp_path / "out")


def test_the_job_survives_its_token(tmp_path):
    task = ScoringTask(EvaluationConfig(tasks=["a"]), "r", True)
    job = Job(make_plan(2), str(TINY), None, str(tmp_path), EngineConfig(), scoring=task)
    again = Job.from_token(job.to_token())
    assert again.to_token() == job.to_token()
    assert again == job
    assert Launch.from_plan(again.plan, tmp_path).kind == "cpu"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hang_seconds": "soon"}, "hang_seconds is 'soon', but must be a valid number"),
        ({"engine": {"timeout_seconds": None}}, "engine: timeout_seconds is None"),
        ({"engine": {"colour": 1}}, "has the unknown key 'colour'"),
        ({"scoring": []}, "scoring is \\[\\], but must be an object"),
        ({"scoring": {"settings": {"fewshot": "two"}}}, "scoring: settings.fewshot is 'two'"),
        ({"more": 1}, "but must hold the keys plan, model_path"),
    ],
)
def test_a_token_of_another_form_is_one_sentence(change, words):
    fields = {
        "plan": make_plan(1).to_json(), "model_path": "m", "input": None, "output": "o", "engine": {}, "batch": {},
        "scoring": None, "trust_remote_code": False, "supervised": True, "input_sha256": None, "hang_seconds": None,
        "memory_wait_seconds": 0.0, "template_time": None,
    }  # fmt: skip
    assert Job.from_token(pack_token(fields)).output == "o"
    with pytest.raises(UserError, match=words) as error:
        Job.from_token(pack_token(fields | change))
    assert "\n" not in str(error.value)
