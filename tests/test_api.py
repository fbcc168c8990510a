"""`from ds_llmpq import LLM, SamplingParams`: cheap to import, one sentence for mistakes, and the answers of `run`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import ds_llmpq
from ds_llmpq import LLM, SamplingParams, UserError, config
from ds_llmpq.api import _is_one, _output, _row
from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.batch.reader import read_requests
from ds_llmpq.batch.request import derive_seed
from ds_llmpq.serving.batch_run import BatchRun

MODEL = Path(__file__).parent / "assets" / "tiny-llama"
EXACT = {"engine.dtype": "float32", "quant.bits": [16], "workload.sequences": 4}
CHAT = [{"role": "user", "content": "What is a pipeline?"}]


def test_importing_the_package_loads_next_to_nothing():
    code = (
        "import json, sys; before = set(sys.modules); import ds_llmpq; "
        "print(json.dumps([name.split('.')[0] for name in set(sys.modules) - before]))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(ran.stdout))
    assert not loaded & {"torch", "deepspeed", "transformers", "numpy", "hydra", "omegaconf", "pydantic"}


def test_the_class_itself_loads_no_heavy_framework():
    code = "import sys; from ds_llmpq import LLM; print([n for n in ('torch', 'deepspeed') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_public_name_is_there():
    for name in ds_llmpq.__all__:
        assert getattr(ds_llmpq, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        _ = ds_llmpq.LMM


def test_a_row_holds_what_was_asked_for():
    row = _row(3, "Hello", SamplingParams(max_tokens=5, temperature=0.5, seed=0, stop=("\n",)))
    assert row == {
        "custom_id": "3",
        "method": "POST",
        "url": "/v1/completions",
        "body": {
            "prompt": "Hello",
            "max_tokens": 5,
            "temperature": 0.5,
            "top_p": 1.0,
            "top_k": 0,
            "seed": 0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": ["\n"],
            "ignore_eos": False,
            "return_token_ids": True,
        },
    }
    assert _row(0, "Hello", None)["body"] == {"prompt": "Hello", "return_token_ids": True}
    assert _row(0, CHAT, SamplingParams())["body"]["messages"] == CHAT
    assert _row(0, [1, 2], SamplingParams())["body"]["prompt"] == [1, 2]


def test_what_is_asked_for_goes_over_the_settings(tmp_path):
    """Greedy and a seed of 0 are asked for like any other value; without parameters the settings stand."""
    settings = BatchConfig(temperature=0.8, max_tokens=9, seed=4)
    file = tmp_path / "rows.jsonl"
    asked = [SamplingParams(), SamplingParams(temperature=1.0, seed=0), SamplingParams(temperature=1.0), None]
    file.write_text("".join(json.dumps(_row(index, "Hello", each)) + "\n" for index, each in enumerate(asked)))
    greedy, seeded, unseeded, left_open = (each.params for each in read_requests(file, settings).requests)
    assert (greedy.temperature, greedy.max_tokens) == (0.0, 128)
    assert seeded.seed == 0
    assert unseeded.seed == derive_seed(4, "2")
    assert (left_open.temperature, left_open.max_tokens, left_open.seed) == (0.8, 9, derive_seed(4, "3"))


def test_one_prompt_is_told_from_many():
    assert _is_one("text")
    assert _is_one([1, 2, 3])
    assert _is_one(CHAT)
    assert not _is_one(["text"])
    assert not _is_one([[1, 2], "text"])
    assert not _is_one([CHAT, CHAT])


def test_a_failed_row_says_why_in_its_place():
    row = {"custom_id": "0", "response": None, "error": {"code": "x", "message": "the prompt is too long."}}
    found = _output(row, "text")
    assert found.error == "the prompt is too long."
    assert found.outputs[0].finish_reason == "error"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "/nowhere"}, "has no config.json"),
        ({"cluster": "no_such_cluster"}, "no_such_cluster"),
        ({"cluster": "/nowhere/cluster.yaml"}, "cluster.yaml"),
        ({"cluster": {"nme": "x"}}, "nme"),
        ({"settings": {"planner.thta": 1}}, "thta"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        LLM(**{"model": MODEL, "cluster": "local_cpu2", **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (["a", ""], None, r"prompts\[1\]: prompt is empty"),
        (["a"], SamplingParams(temperature=3.0), r"prompts\[0\]: temperature is 3.0"),
        (["a"], [SamplingParams()] * 2, "1 prompts have 2 sampling_params"),
        (["a"], {"max_tokens": 1}, "SamplingParams"),
        ([[{"role": "robot", "content": "a"}]], None, r"messages\[0\].role is 'robot'"),
        ([object()], None, "cannot be written as JSON"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_starts(prompts, params, message):
    with pytest.raises(UserError, match=message):
        LLM(MODEL, "local_cpu2").generate(prompts, params)


def test_no_prompts_are_no_answers():
    assert LLM(MODEL, "local_cpu2").generate([]) == []


def test_a_plan_is_made_and_kept(tmp_path):
    llm = LLM(MODEL, "local_cpu2", settings={**EXACT, "workload.prompt_tokens": 16, "workload.generated_tokens": 8})
    plan = llm.plan(out=tmp_path)
    assert plan.stages[-1].layers[1] == 8
    assert plan.workload.sequences == 4
    assert (tmp_path / "plan.json").is_file()
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run"):
        llm.plan(out=tmp_path)


def test_a_cluster_may_be_an_object_or_a_dict():
    composed = config.to_object(config.compose_settings("run", ["cluster=local_cpu2"]), config.COMMANDS["run"]).cluster
    kind = {"memory_bytes": 2**32, "kind": "cpu", "memory_bandwidth_bytes_per_second": 1e10}
    kind["flops_per_second"] = {"float32": 1e10}
    devices = [{"type": "core", "slot": 0}]
    own = {"name": "mine", "device_types": {"core": kind}, "hosts": [{"name": "localhost", "devices": devices}]}
    assert LLM(MODEL, composed).settings.cluster == composed
    assert LLM(MODEL, own).settings.cluster.hosts[0].devices[0].type == "core"


def test_without_a_cluster_it_is_what_this_machine_has(monkeypatch):
    monkeypatch.setattr(config, "query_gpus", list)
    cluster = LLM(MODEL).settings.cluster
    assert (cluster.name, [len(host.devices) for host in cluster.hosts]) == ("auto", [1])


@pytest.mark.slow
@pytest.mark.launcher
def test_greedy_answers_equal_transformers_and_run(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = ["Once upon a time", "The cat sat on", CHAT, "def main():"]
    params = [SamplingParams(max_tokens=count) for count in (12, 7, 9, 16)]
    llm = LLM(MODEL, "local_cpu2", settings=EXACT)
    found = llm.generate(prompts, params, out=tmp_path / "api")
    assert [each.prompt for each in found] == prompts

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    for each, asked in zip(found, params, strict=True):
        ids = torch.tensor([each.prompt_token_ids])
        expected = model.generate(ids, max_new_tokens=asked.max_tokens, do_sample=False)[0, ids.shape[1] :].tolist()
        assert list(each.outputs[0].token_ids) == expected
        assert each.outputs[0].text == tokenizer.decode(expected, skip_special_tokens=True)
        ended = expected[-1] == tokenizer.eos_token_id
        assert each.outputs[0].finish_reason == ("stop" if ended else "length")

    done = llm.run(tmp_path / "api" / "prompts.jsonl", out=tmp_path / "run")
    assert isinstance(done, BatchRun)
    assert done.tally.complete
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    texts = {row["custom_id"]: row["response"]["body"]["choices"][0] for row in rows}
    for each in found:
        choice = texts[each.request_id]
        assert choice.get("text", choice.get("message", {}).get("content")) == each.outputs[0].text

    again = llm.generate(prompts, params, out=tmp_path / "api")  # finished: read, not run
    assert again == found
    with pytest.raises(UserError, match="holds other prompts"):
        llm.generate(["another"], out=tmp_path / "api")
