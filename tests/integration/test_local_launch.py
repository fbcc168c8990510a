"""`ds-llmpq run` through the real deepspeed launcher on this machine: results, errors, the printed line, endings."""

import json
import os
import re
import signal
import subprocess

import pytest
import torch
from launching import (
    BUDGETS,
    PRECISE,
    TEXT,
    WORKLOAD,
    Command,
    completion,
    environment,
    error_sentence,
    gone,
    read_rows,
    run,
    wait_for_results,
    write_cluster,
    write_rows,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_llmpq.launch.launcher import find_free_port
from ds_llmpq.plan import read_plan
from ds_llmpq.quant.hqq import list_linears, quantize_linear

pytestmark = pytest.mark.launcher


def test_every_row_has_its_result_or_its_error(local_run, prompts):
    assert local_run.ended.returncode == 3, local_run.ended.stderr
    results, errors = read_rows(local_run.out / "results.jsonl"), read_rows(local_run.out / "errors.jsonl")
    assert set(results) == {"chat", *(f"row-{index}" for index in range(9))}
    assert set(errors) == {None, "too-long", "no-prompt"}
    assert sorted(row["error"]["line"] for row in errors.values()) == [10, 11, 13]
    counts = json.loads((local_run.out / "metrics.json").read_text())["counts"]
    assert counts == {"total": len(prompts.read_text().splitlines()), "completed": 10, "failed": 3}
    assert re.search(r"^verdict: .*the plan's times", local_run.ended.stdout, re.MULTILINE)
    assert "3 requests failed" in local_run.ended.stdout


def test_the_plan_is_uneven_and_of_several_widths(local_run):
    stages = read_plan(local_run.out / "plan.json").stages
    assert len({last - first for first, last in (stage.layers for stage in stages)}) == 2
    assert len({bits for stage in stages for bits in stage.bits}) > 1


def test_texts_are_those_of_one_process_with_the_same_layers(local_run, checkpoint, prompts):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = single_process(checkpoint, read_plan(local_run.out / "plan.json"))
    results = read_rows(local_run.out / "results.jsonl")
    rows = [json.loads(line) for line in prompts.read_text().splitlines() if line.startswith('{"custom_id"')]
    asked = {row["custom_id"]: row["body"] for row in rows if row["custom_id"] in results}
    for custom_id, body in asked.items():
        if "messages" in body:
            text = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
        else:
            text = body["prompt"]
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens="messages" not in body)])
        made = model.generate(ids, max_new_tokens=body["max_tokens"], do_sample=False)[0, ids.shape[1] :]
        answer = results[custom_id]["response"]["body"]
        assert answer["usage"]["prompt_tokens"] == ids.shape[1]
        assert answer["usage"]["completion_tokens"] == len(made)
        choice = answer["choices"][0]
        given = choice["message"]["content"] if "messages" in body else choice["text"]
        assert given == tokenizer.decode(made, skip_special_tokens=True)


@torch.no_grad()
def single_process(checkpoint, plan):
    """The whole model in float32, its linears those that HQQ makes of them at the plan's widths."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    widths = [bits for stage in plan.stages for bits in stage.bits]
    quantized = {}
    for layer, bits in zip(model.model.layers, widths, strict=True):
        for name in list_linears(layer) if bits < 16 else []:
            linear = layer.get_submodule(name)
            hqq = quantize_linear(
                linear.weight.data, None, bits, plan.quant.to_config(), torch.float32, torch.device("cpu")
            )
            quantized[linear] = hqq.dequantize()
    model = model.float().eval()
    for linear, weight in quantized.items():
        linear.weight.data = weight
    return model


def test_the_printed_line_runs_as_it_stands_and_without_ssh(local_run, checkpoint, tmp_path):
    cluster = write_cluster(tmp_path / "cluster.yaml", {"localhost": list(BUDGETS)})
    own = (f"model.path={checkpoint}", f"cluster_file={cluster}", f"out={tmp_path / 'plan'}")
    planned = run("plan", *own, *PRECISE, *WORKLOAD).stdout
    (line,) = (text.removeprefix("by hand: ") for text in planned.splitlines() if text.startswith("by hand: "))
    asked = [completion("row-3", TEXT[9:32], 10), completion("row-8", TEXT[24:77], 20)]
    rows = write_rows(tmp_path / "rows.jsonl", asked)
    line = line.replace("input=FILE", f"input={rows}").replace("output=DIR", f"output={tmp_path / 'out'}")
    line = line.replace(
        "deepspeed ", f"deepspeed --master_port {find_free_port()} ", 1
    )  # others may hold the default one
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text("#!/bin/sh\nexit 255\n")
    (tmp_path / "bin" / "ssh").chmod(0o755)
    env = environment()
    env["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{env['PATH']}"
    ended = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    expected = read_rows(local_run.out / "results.jsonl")
    assert read_rows(tmp_path / "out" / "results.jsonl") == {name: expected[name] for name in ("row-3", "row-8")}


@pytest.fixture
def long_run(checkpoint, tmp_path):
    """A started run of many rows, of which some have finished and most have not."""
    rows = [completion(f"row-{index}", TEXT, 24) for index in range(4000)]
    for row in rows:
        row["body"]["ignore_eos"] = True
    cluster = write_cluster(tmp_path / "cluster.yaml", {"localhost": list(BUDGETS)})
    command = Command(
        (
            "run", f"model.path={checkpoint}", f"cluster_file={cluster}", f"out={tmp_path / 'out'}",
            f"input={write_rows(tmp_path / 'rows.jsonl', rows)}", *PRECISE, *WORKLOAD, "run.restarts=0",
        )
    )  # fmt: skip
    process = command.start()
    try:
        wait_for_results(tmp_path / "out" / "results.jsonl", process)
        yield command, process, tmp_path / "out"
    finally:
        process.kill()
        process.communicate()
        assert gone(command.processes), "processes were left behind"


def finished(folder):
    """Ids of the results in a folder, every row of which must be whole."""
    found = read_rows(folder / "results.jsonl")
    assert 0 < len(found) < 4000
    return found


def ranks(command):
    return [process for process in command.processes() if "ds_llmpq.commands.serve" in process.cmdline()]


def ended(process, timeout=240.0):
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_a_dead_rank_ends_the_run(long_run):
    command, process, folder = long_run
    launched = [each for each in ranks(command) if "deepspeed.launcher.launch" not in each.cmdline()]
    victims = [each for each in launched if each.environ().get("RANK") == "1"]
    assert len(victims) == 1
    victims[0].kill()
    sentence = error_sentence(ended(process))
    assert "what finished is kept in" in sentence
    assert finished(folder)
    assert gone(command.processes)


def test_an_interrupt_ends_all_ranks(long_run):
    command, process, folder = long_run
    process.send_signal(signal.SIGINT)
    result = ended(process)
    assert result.returncode == 130
    assert error_sentence(result).startswith("error: Interrupted")
    assert finished(folder)
    assert gone(command.processes)


def test_ranks_do_not_outlive_a_killed_run(long_run):
    command, process, folder = long_run
    assert len(ranks(command)) >= 2
    process.kill()
    assert gone(command.processes)
    assert finished(folder)
