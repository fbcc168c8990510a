"""Where layer times come from: a roofline, a profile of these devices, or a source that the caller adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ds_llmpq.cluster.cluster import Cluster, choose_dtype
from ds_llmpq.cluster.devices import DeviceType
from ds_llmpq.cost.fitted import FittedCosts, load_model
from ds_llmpq.cost.latency import LayerCosts, RooflineCosts
from ds_llmpq.cost.linktable import fit_link, read_links
from ds_llmpq.cost.profile import current_setup
from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.planner.build import CostFactory
from ds_llmpq.planner.config import CostConfig, PlannerConfig
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.kernels.base import Kernel
from ds_llmpq.quant.kernels.registry import find_kernel
from ds_llmpq.quant.packing import make_groups

SOURCES = ("auto", "roofline")


class FurtherSource(NamedTuple):
    """Layer times from elsewhere: their kernel, first of those that nothing here runs but a roofline may be asked for,
    and `costs` of (device type, shape, compute dtype, lm_head bits)."""

    kernels: Sequence[Kernel]
    costs: Callable[[DeviceType, ModelShape, str, int], LayerCosts]


def select_costs(
    cost: CostConfig,
    planner: PlannerConfig,
    quant: QuantConfig,
    cluster: Cluster,
    shape: ModelShape,
    dtype: str,
    kernel: Kernel,
    further: Mapping[str, FurtherSource] | None = None,
    captured: bool = False,
    drawn_share: float = 0.0,
) -> tuple[CostFactory | None, Cluster, Kernel]:
    """(`make_costs` for `prepare`, the cluster with measured links, the kernel that the times and the memory are of).

    further: sources by name, beside our own. captured: decode passes run as graphs where no profile says.
    drawn_share: of the rows, those whose tokens are drawn.
    `UserError`: an unknown source, or one that a profile contradicts.
    """
    further = further or {}
    if cost.source not in (*SOURCES, *further):
        raise UserError(f"cost.source={cost.source!r}; use one of {', '.join((*SOURCES, *further))}")
    if cost.kernel is not None and cost.source != "roofline":
        raise UserError(f"cost.kernel={cost.kernel} needs cost.source=roofline, not {cost.source}")
    if cost.source == "auto":
        return *load_profile_costs(planner, quant, cluster, shape, dtype, kernel, captured, drawn_share), kernel
    if planner.profile is not None:
        raise UserError(f"cost.source={cost.source} and planner.profile contradict each other; give one of them")
    if cost.source == "roofline":
        return None, cluster, kernel if cost.kernel is None else _find_kernel(cost.kernel, further)
    dtype, source = choose_dtype(cluster, dtype), further[cost.source]
    return lambda device_type: source.costs(device_type, shape, dtype, quant.lm_head_bits), cluster, source.kernels[0]


def _find_kernel(name: str, further: Mapping[str, FurtherSource]) -> Kernel:
    """A kernel to cost a plan for; those of further sources, which nothing runs, are known too."""
    theirs = {kernel.name: kernel for source in further.values() for kernel in source.kernels}
    return theirs[name] if name in theirs else find_kernel(name)


def load_profile_costs(
    planner: PlannerConfig,
    quant: QuantConfig,
    cluster: Cluster,
    shape: ModelShape,
    dtype: str,
    kernel: Kernel,
    captured: bool = False,
    drawn_share: float = 0.0,
) -> tuple[CostFactory | None, Cluster]:
    """(`make_costs` for `prepare`, the cluster with measured links); both as they were where no profile is given.

    `UserError`: the profile was made with other libraries, kernel, compute dtype or layer shape.
    """
    if planner.profile is None:
        return None, cluster
    folder = Path(planner.profile).expanduser().absolute()
    dtype = choose_dtype(cluster, dtype)
    groups = make_groups(quant)
    setup = current_setup(shape, dtype, kernel, groups, quant.lm_head_bits)
    model = load_model(folder, shape, setup, planner.profile_force)

    def make_costs(device_type: DeviceType) -> FittedCosts:
        roofline = RooflineCosts(device_type, shape, dtype, groups, kernel, quant.lm_head_bits, captured)
        return FittedCosts(device_type, model, roofline, drawn_share)

    table = (folder if folder.is_dir() else folder.parent) / "links.csv"
    return make_costs, _with_links(cluster, table) if table.is_file() else cluster


def _with_links(cluster: Cluster, table: Path) -> Cluster:
    """Measured pairs replace what the cluster file says of them; all others stay."""
    messages = read_links(table)
    names = {device.name for device in cluster.devices}
    pairs = {(message.source, message.target) for message in messages}
    pairs = {pair for pair in pairs if pair[0] != pair[1] and set(pair) <= names}
    measured = {
        pair: fit_link([message for message in messages if (message.source, message.target) == pair])
        for pair in sorted(pairs)
    }
    if not measured:
        return cluster
    every = len(measured) == len(names) * (len(names) - 1)
    source = f"measured ({table.name})" + ("" if every else f"; other pairs: {cluster.links.source}")
    links = replace(cluster.links, pairs={**cluster.links.pairs, **measured}, source=source)
    return replace(cluster, links=links)
