"""Where layer times come from: a roofline, a profile of these devices, or published figures of the paper's GPUs."""

from __future__ import annotations

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.devices import DeviceType
from ds_llmpq.cluster.gates import common_dtype
from ds_llmpq.cost import published
from ds_llmpq.cost.kernels import check_kernel
from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.planner.build import CostsOf
from ds_llmpq.planner.config import CostConfig, PlannerConfig
from ds_llmpq.planner.profiled import profiled_costs
from ds_llmpq.quant.config import QuantConfig

SOURCES = ("auto", "roofline", "published")


def source_of_costs(
    cost: CostConfig,
    planner: PlannerConfig,
    quant: QuantConfig,
    cluster: Cluster,
    shape: ModelShape,
    dtype: str,
    kernel: str,
) -> tuple[CostsOf | None, Cluster, str]:
    """(`costs_of` for `prepare`, the cluster with measured links, the kernel that the times and the memory are of).

    `UserError`: an unknown source, one that a profile contradicts, or no published figures for a device.
    """
    if cost.source not in SOURCES:
        raise UserError(f"cost.source={cost.source!r}; use one of {', '.join(SOURCES)}")
    if cost.kernel is not None and cost.source != "roofline":
        raise UserError(f"cost.kernel={cost.kernel} needs cost.source=roofline, not {cost.source}")
    if cost.source == "auto":
        return *profiled_costs(planner, quant, cluster, shape, dtype, kernel), kernel
    if planner.profile is not None:
        raise UserError(f"cost.source={cost.source} and planner.profile contradict each other; give one of them")
    if cost.source == "roofline":
        return None, cluster, kernel if cost.kernel is None else check_kernel(cost.kernel)
    dtype = common_dtype(cluster, dtype)

    def costs_of(device_type: DeviceType) -> published.PublishedCosts:
        return published.PublishedCosts(device_type, shape, dtype, quant.head_bits)

    return costs_of, cluster, published.KERNEL
