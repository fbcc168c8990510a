"""From settings to a problem: what GPUs' captured decode passes change."""

import json

import pytest

from ds_llmpq import config
from ds_llmpq.errors import InfeasibleError, UserError
from ds_llmpq.research.published_costs import SOURCES
from ds_llmpq.serving.config import PlanConfig
from ds_llmpq.serving.planning import build_problem, make_plan


def workspace(*keys):
    """Bytes of a decode pass, and what the problem was built from."""
    composed = config.compose_settings("plan", ["model=opt_13b", "workload.sequences=8", *keys])
    settings = config.load_cluster(config.to_object(composed, PlanConfig))
    problem, _ = build_problem(settings, SOURCES)
    return problem.memory.workspace_bytes.decode[8]


def test_plans_for_gpus_set_memory_aside_for_captured_graphs():
    gpus = workspace("cluster=cluster2")
    assert gpus > workspace("cluster=cluster2", "engine.decode_graphs=false")
    assert workspace("cluster=cluster2", "engine.decode_graphs=true") == gpus


@pytest.mark.parametrize("graphs", ["true", "false"])
def test_processors_and_published_systems_have_none(graphs):
    on_cpu = workspace("cluster=demo_cpu2", f"engine.decode_graphs={graphs}")
    assert on_cpu == workspace("cluster=demo_cpu2")
    published = workspace("cluster=cluster2", "cost.source=published", f"engine.decode_graphs={graphs}")
    assert published == workspace("cluster=cluster2", "cost.source=published")


def test_a_deadline_is_for_all_rows_of_the_input(tmp_path):
    """Ten times as many rows as run at once are given ten times the time."""
    rows = tmp_path / "rows.jsonl"
    body = {"model": "m", "prompt": "x", "max_tokens": 4}
    row = {"method": "POST", "url": "/v1/completions", "body": body}
    rows.write_text("".join(json.dumps({"custom_id": str(i)} | row) + "\n" for i in range(160)))
    keys = ["+experiment=demo", "planner.calibrate=never", "planner.solver=search", f"input={rows}"]

    def plan(*further):
        composed = config.compose_settings("plan", [*keys, *further])
        return make_plan(config.load_cluster(config.to_object(composed, PlanConfig)), tmp_path)

    free = plan().predicted.latency_seconds
    assert "160 requests: " in plan(f"planner.deadline_seconds={11 * free}").explanation[1]
    with pytest.raises(InfeasibleError, match="finish 160 requests within"):
        plan(f"planner.deadline_seconds={free}")


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (("engine.kv_cache=paged", "engine.batch_invariant=true"), "cannot be had with engine.kv_cache=paged"),
        (("engine.kv_cache=pages",), "engine.kv_cache is 'pages' but must be slots or paged"),
        (("workload.pool_positions=640",), "workload.pool_positions=640 is of no use unless"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(keys, sentence):
    with pytest.raises(UserError, match=sentence):
        workspace("cluster=demo_cpu2", *keys)
