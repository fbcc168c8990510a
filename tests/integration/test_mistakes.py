"""What a user can get wrong: one sentence on standard error, a non-zero exit code, no traceback, nothing left over."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from launching import (
    BUDGETS,
    PRECISE,
    ROOT,
    WORKLOAD,
    Command,
    completion,
    environment,
    error_sentence,
    run,
    write_cluster,
    write_rows,
)

pytestmark = pytest.mark.launcher


@pytest.fixture
def base(checkpoint, tmp_path):
    """Arguments of a run in which nothing is wrong; later ones win."""
    cluster = write_cluster(tmp_path / "cluster.yaml", {"localhost": list(BUDGETS)})
    rows = write_rows(tmp_path / "rows.jsonl", [completion("a", "Hello"), completion("b", "world")])
    own = [f"model.path={checkpoint}", f"cluster_file={cluster}", f"input={rows}", f"out={tmp_path / 'out'}"]
    return [*own, *PRECISE, *WORKLOAD]


MISTAKES = {
    "no checkpoint": ("model.path={tmp}/none", "/none"),
    "no such file": ("input={tmp}/none.jsonl", "none.jsonl"),
    "empty input": ("input={tmp}/empty", "no rows"),
    "repeated id": ("input={tmp}/repeated.jsonl", "custom_id 'a' stands on line 1 and again on line 2"),
    "a file as folder": ("out={tmp}/empty", "not a folder"),
    "unwritable folder": ("out=/proc/nowhere", "/proc/nowhere"),
    "results are there": ("out={tmp}/done", "already holds 1 results"),
    "hostfile disagrees": ("hostfile={tmp}/hostfile", "slot 1 of host localhost"),
    "unknown key": ("quant.bit=[4]", "quant.bit"),
    "wrong type": ("quant.bits=four", "quant.bits=four"),
    "impossible width": ("quant.bits=[5]", "[5]"),
    "unknown cluster": ("cluster=nowhere", "nowhere"),
    "broken plan": ("plan={tmp}/empty", "cannot be read"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_said_before_anything_starts(case, base, tmp_path):
    argument, expected = MISTAKES[case]
    (tmp_path / "empty").write_text("")
    (tmp_path / "hostfile").write_text("localhost slots=1\n")
    write_rows(tmp_path / "repeated.jsonl", [completion("a", "x"), completion("a", "y")])
    (tmp_path / "done").mkdir()
    write_rows(
        tmp_path / "done" / "results.jsonl", [{"id": "batch_req_1", "custom_id": "a", "response": {}, "error": None}]
    )
    result = run("run", *base, argument.format(tmp=tmp_path), timeout=60)
    assert result.returncode == 1
    assert expected in error_sentence(result)
    assert not list(tmp_path.rglob("launcher.log"))


def test_a_cluster_too_small_says_what_would_fit(base, tmp_path):
    result = run("run", *base, "workload.sequences=4000", timeout=60)
    assert result.returncode == 2
    sentence = error_sentence(result)
    assert "lacks" in sentence
    assert "sequences instead of 4000" in sentence


def test_plan_for_another_model_and_wrong_number_of_ranks(base, checkpoint, tmp_path):
    assert run("plan", *(each for each in base if not each.startswith("input=")), timeout=60).returncode == 0
    plan = tmp_path / "out" / "plan.json"
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    config = json.loads((other / "config.json").read_text()) | {"rms_norm_eps": 0.1}
    (other / "config.json").write_text(json.dumps(config))
    refused = run("run", *base, f"plan={plan}", f"model.path={other}", f"out={tmp_path / 'again'}", timeout=60)
    assert "plan again for this model" in error_sentence(refused)

    alone = environment() | {"RANK": "0", "WORLD_SIZE": "1"}
    line = [sys.executable, "-m", "ds_llmpq.commands.serve", f"plan={plan}", "input=x", f"output={tmp_path / 'x'}"]
    refused = subprocess.run(line, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert refused.stderr.startswith("ds-llmpq error: The plan has 2 stages, but 1 rank started")
    assert len(refused.stderr.splitlines()) == 1


def test_a_damaged_shard_ends_all_ranks(base, checkpoint, tmp_path):
    """Found only while loading, by a rank: the launcher's others end with it, and its sentence reaches the user."""
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    with open(broken / "model.safetensors", "r+b") as file:
        file.truncate(os.path.getsize(broken / "model.safetensors") // 2)
    command = Command(("run", *base, f"model.path={broken}"))
    result = command.run(timeout=120)
    assert result.returncode == 1
    assert "model.safetensors" in error_sentence(result)
    assert not command.processes()
