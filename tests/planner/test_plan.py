"""`plan.json`: round trips, validation, and hand-written plans through the checker."""

import copy
import json
from pathlib import Path

import pytest
from random_problems import random_problem

from ds_llmpq.errors import UserError
from ds_llmpq.plan import Assignment, MicroBatches, Plan, StageAssignment, read_plan
from ds_llmpq.planner import check_plan, solve


@pytest.fixture(scope="module")
def solved():
    obj = random_problem(2, layers=4, devices=2, mode="theta")
    return obj, solve(obj, solver="search", gap=0)


def test_round_trip_through_text(solved):
    plan = solved[1]
    text = json.dumps(plan.to_json())
    assert Plan.from_json(json.loads(text)).to_json() == json.loads(text)
    assert Plan.from_json(json.loads(text)).assignment() == plan.assignment()


def test_plan_holds_what_the_engine_needs(solved):
    plan = solved[1].to_json()
    assert plan["schema"] == 2
    assert plan["stages"][0]["layers"][0] == 0
    assert plan["stages"][-1]["layers"][1] == 4
    assert set(plan["stages"][0]["memory_bytes"]) == {"weights", "kv", "embed", "head", "workspace"}
    assert plan["solver"]["bound"] <= plan["solver"]["objective"] * (1 + 1e-9)
    assert set(plan["baselines"]) >= {"uniform", "pipeedge", "adabits", "memory_proportional", "single_device"}
    assert plan["explanation"]


MISTAKES = [
    (("schema",), 7, "plan.schema is 7"),
    (("extra",), 7, "unknown key"),
    (("stages",), [], "plan.stages is []"),
    (("stages", 0, "layers"), [0, 0], "at least one layer"),
    (("stages", 0, "bits"), [], "bits has 0 entries"),
    (("stages", 0, "memory_bytes"), {}, "lacks the key 'weights'"),
    (("micro_batch", "prefill"), 0, "plan.micro_batch.prefill is 0"),
    (("predicted", "latency_seconds"), "fast", "plan.predicted.latency_seconds is 'fast'"),
    (("solver", "status"), None, "plan.solver.status is None"),
    (("explanation",), [3], "plan.explanation[0] is 3"),
]


@pytest.mark.parametrize(("path", "value", "sentence"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_a_mistake_is_named(solved, path, value, sentence):
    obj = copy.deepcopy(solved[1].to_json())
    target = obj
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(UserError) as caught:
        Plan.from_json(obj)
    assert sentence in str(caught.value)


def test_a_plan_whose_sequences_share_cache_blocks(solved):
    obj = copy.deepcopy(solved[1].to_json())
    obj["workload"]["pool_positions"] = 100
    assert not Plan.from_json(obj).is_deployed
    obj["deployment"] = {"compute_dtype": "float32"}
    for stage in obj["stages"]:
        stage |= {"kind": "cpu", "slot": 0, "kernel": "openvino_graph"}
    plan = Plan.from_json(obj)
    assert plan.cache_positions == max(128, plan.row_positions)
    assert plan.count_pool_blocks(32) == plan.cache_positions // 32 - 1
    fewer = plan.with_fewer_sequences()
    assert fewer.is_paged
    assert fewer.cache_positions < plan.cache_positions or plan.cache_positions == plan.row_positions
    for stage in obj["stages"]:
        stage["kernel"] = "dequantize"
    assert Plan.from_json(obj).cache_positions == plan.cache_positions
    with pytest.raises(UserError, match=r"batch_invariant=true cannot be had with engine.kv_cache=paged"):
        Plan.from_json(obj).check_batch_invariant(True)


def test_stages_must_follow_each_other(solved):
    obj = copy.deepcopy(solved[1].to_json())
    first = obj["stages"][0]
    first["layers"] = [first["layers"][0] + 1, first["layers"][1] + 1]
    with pytest.raises(UserError, match="must begin at 0"):
        Plan.from_json(obj)


def test_check_costs_a_plan_as_the_solver_does(solved):
    obj, plan = solved
    checked = check_plan(obj, plan.to_json())
    assert checked.predicted == plan.predicted
    assert checked.stages == plan.stages
    assert checked.solver.status == "checked"
    assert checked.solver.objective == plan.solver.objective


def test_check_refuses_and_says_why(solved):
    obj, plan = solved
    sizes = (plan.micro_batch.prefill, plan.micro_batch.decode)
    broken = Assignment((StageAssignment(plan.stages[0].device, 0, 3, (obj["bits"][0],) * 3),), *sizes)
    with pytest.raises(UserError, match="end at layer 3"):
        check_plan(obj, broken)


ASSETS = Path(__file__).parents[1] / "plan" / "assets"


@pytest.mark.parametrize("name", ["deployed", "solved"])
def test_the_former_schema_reads_to_the_same_plan_and_says_so(name, capsys):
    former = read_plan(ASSETS / f"{name}.schema1.json")
    assert "former schema 1" in capsys.readouterr().err
    assert former.to_json()["schema"] == 2
    assert Plan.from_json(former.to_json()) == former
    assert former.is_deployed == (name == "deployed")


def test_what_launching_needs_of_the_former_schema_is_kept():
    old = json.loads((ASSETS / "deployed.schema1.json").read_text())
    plan = Plan.from_json(old)
    assert plan.deployment.compute_dtype == old["engine"]["dtype"]
    assert plan.deployment.env == old["engine"]["env"]
    assert list(plan.deployment.link_seconds.decode) == old["engine"]["link_seconds"]["decode"]
    for stage, entry, own in zip(plan.stages, old["stages"], old["engine"]["stages"], strict=True):
        assert {name: getattr(stage, name) for name in own} == own
        assert stage.memory_bytes.by_part() == entry["memory_bytes"]
        assert (stage.device, stage.host, stage.rank) == (entry["device"], entry["host"], entry["rank"])
    assert plan.micro_batch == MicroBatches(**old["micro_batch"])
    assert plan.model.fingerprint == old["model"]["fingerprint"]
    assert list(plan.quant.per_channel_bits) == old["quant"]["whole_rows"]
