"""Variables of the ranks: a file may set those of networks and threads, the rest is asked for on the command line."""

import json
import shutil
from pathlib import Path

import pytest

from ds_llmpq import cli
from ds_llmpq.errors import UserError
from ds_llmpq.launch.environment import check_environment

DANGEROUS = ["LD_PRELOAD", "PYTHONPATH", "PATH", "NCCL_NET_PLUGIN", "NCCL_DEBUG_FILE", "OMP_TOOL_LIBRARIES", "\x1b[2J"]


@pytest.mark.parametrize("name", DANGEROUS)
def test_a_file_may_not_set_what_loads_or_writes(name):
    with pytest.raises(UserError, match=r"^plan\.json sets .*cluster\.env"):
        check_environment({name: "x"}, {}, "plan.json")
    check_environment({name: "x"}, {name: "x"}, "plan.json")  # asked for
    with pytest.raises(UserError):
        check_environment({name: "x"}, {name: "y"}, "plan.json")


def test_a_file_may_choose_interfaces_and_threads():
    names = ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "MASTER_ADDR", "OMP_NUM_THREADS"]
    check_environment(dict.fromkeys(names, "1"), {}, "plan.json")


def test_run_refuses_the_variables_of_a_plan_and_names_the_way(tmp_path, capfd):
    assert exit_code("plan", "workload.sequences=4", f"out={tmp_path}/plan") == 0
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    plan["deployment"]["env"]["LD_PRELOAD"] = "/nowhere.so"
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    shutil.copy(Path(__file__).parents[2] / "launch" / "demo_prompts.jsonl", tmp_path / "rows.jsonl")
    capfd.readouterr()
    out = tmp_path / "out"
    assert exit_code("run", f"plan={tmp_path}/plan.json", f"input={tmp_path}/rows.jsonl", f"out={out}") == 1
    said = capfd.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "'LD_PRELOAD' to '/nowhere.so'" in said
    assert "+cluster.env.LD_PRELOAD=" in said
    assert not (out / "results.jsonl").exists()


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return ended.value.code
