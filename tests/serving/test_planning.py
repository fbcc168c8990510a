"""From settings to a problem: what GPUs' captured decode passes change."""

import pytest

from ds_llmpq import config
from ds_llmpq.research.published_costs import SOURCES
from ds_llmpq.serving.config import PlanConfig
from ds_llmpq.serving.planning import build_problem


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
