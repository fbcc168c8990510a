"""Which source of times is taken, and what contradicts itself."""

import pytest

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.config import compose_settings, to_object
from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.planner.config import CostConfig, PlannerConfig
from ds_llmpq.planner.cost_source import select_costs
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.research.published_costs import KERNEL, SOURCES, PublishedCosts
from ds_llmpq.serving.config import PlanConfig


@pytest.fixture(scope="module")
def place():
    settings = to_object(compose_settings("plan", ["+experiment=paper", "cluster=cluster9"]), PlanConfig)
    return Cluster.from_config(settings.cluster), ModelShape.from_config(settings.model.shape)


def source(place, cost, planner=None):
    return select_costs(cost, planner or PlannerConfig(), QuantConfig(), *place, "auto", DEQUANTIZE, SOURCES)


def test_each_source_says_its_kernel(place):
    cluster, _ = place
    assert source(place, CostConfig()) == (None, cluster, DEQUANTIZE)
    assert source(place, CostConfig("roofline")) == (None, cluster, DEQUANTIZE)
    assert source(place, CostConfig("roofline", "fused")) == (None, cluster, KERNEL)
    assert source(place, CostConfig("roofline", "humming"))[2].name == "humming"
    make_costs, _, kernel = source(place, CostConfig("published"))
    assert kernel is KERNEL
    assert isinstance(make_costs(cluster.device_types["t4"]), PublishedCosts)


def test_lm_head_s_width_reaches_published_times(place):
    def seconds(lm_head_bits):
        make_costs, cluster, _ = select_costs(
            CostConfig("published"),
            PlannerConfig(),
            QuantConfig(lm_head_bits=lm_head_bits),
            *place,
            "auto",
            DEQUANTIZE,
            SOURCES,
        )
        return make_costs(cluster.device_types["t4"]).head_seconds(1)

    assert seconds(4) < 0.5 * seconds(16)


@pytest.mark.parametrize(
    ("cost", "planner", "said"),
    [
        (CostConfig("guess"), None, "auto, roofline, published"),
        (CostConfig("roofline"), PlannerConfig(profile="x"), "contradict"),
        (CostConfig("published", "fused"), None, "needs cost.source=roofline"),
        (CostConfig("roofline", "cublas"), None, "cublas"),
    ],
)
def test_a_mistake_is_one_sentence(place, cost, planner, said):
    with pytest.raises(UserError, match=said):
        source(place, cost, planner)
