"""From a cluster, a model's shape and a workload to the planning problem: all tables filled, all origins kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ds_llmpq.cluster.cluster import Cluster, choose_dtype, gate
from ds_llmpq.cluster.devices import BIT_WIDTHS, COMPUTE_DTYPES, DeviceType
from ds_llmpq.cost.latency import LayerCosts, RooflineCosts
from ds_llmpq.cost.links import link_table
from ds_llmpq.cost.memory import MemoryModel
from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.planner.config import PlannerConfig, WorkloadConfig
from ds_llmpq.planner.problem import SCHEMA, Problem
from ds_llmpq.planner.problem_tables import holds_head, middle_share, tabulate_memory, tabulate_times
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.kernels.base import Kernel
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.quant.packing import UNQUANTIZED_BITS, check_lm_head, find_quantization_problem, make_groups
from ds_llmpq.sensitivity.prior import make_prior
from ds_llmpq.sensitivity.table import Sensitivity
from ds_llmpq.wording import format_number

CostFactory = Callable[[DeviceType], LayerCosts]


@dataclass(frozen=True)
class Prepared:
    """A planning problem and what a plan says about where it came from."""

    problem: Problem
    dtype: str  # of arithmetic, cache and unquantized weights
    memory: MemoryModel
    costs: Mapping[str, LayerCosts]  # by device type
    sensitivity: Sensitivity
    provenance: dict[str, str]  # number -> measured, fitted, roofline, datasheet, assumed (with its source)
    notes: tuple[str, ...]  # bit widths left out, and why


def prepare(
    cluster: Cluster,
    shape: ModelShape,
    workload: WorkloadConfig,
    quant: QuantConfig,
    planner: PlannerConfig,
    sensitivity: Sensitivity | None = None,
    dtype: str = "auto",
    kernel: Kernel = DEQUANTIZE,
    make_costs: CostFactory | None = None,
    captured: bool = False,
) -> Prepared:
    """Fill the planning problem.

    sensitivity: None takes the prior from published perplexities. kernel: how quantized linears run.
    make_costs: gives the times of a device type; None is the roofline. captured: GPU stages will capture their decode
    passes, whose graphs take memory and are launched at once.
    UserError: lengths beyond the model's positions, no usable bit width, no common compute dtype, an objective without
    its bound, an sensitivity of another model, or a number out of range.
    """
    check_workload(workload, shape)
    dtype = choose_dtype(cluster, dtype)
    bits, notes = usable_bits(shape, quant)
    check_lm_head(shape.vocab, shape.embed_dim, quant)
    groups = make_groups(quant)
    onednn = dtype == "bfloat16" and not kernel.whole_stage and _has_cpus(cluster)
    memory = MemoryModel(shape, groups, COMPUTE_DTYPES[dtype], kernel, quant.lm_head_bits, quant.kv_bits, onednn)
    if make_costs is None:

        def make_costs(device_type: DeviceType) -> LayerCosts:
            return RooflineCosts(device_type, shape, dtype, groups, kernel, quant.lm_head_bits, captured)

    costs = {name: make_costs(device_type) for name, device_type in cluster.device_types.items()}
    for device_type in cluster.device_types.values():
        notes += [reason for width in bits if (reason := gate(device_type, width, dtype))]
    notes += _without_head(cluster, quant.lm_head_bits)
    if sensitivity is None:
        sensitivity = make_prior(shape.layers, bits, shape.fingerprint)
    sensitivity.check_model(shape.layers)
    sizes = {
        "prefill": micro_batches("prefill", planner.micro_batches.prefill, workload.sequences),
        "decode": micro_batches("decode", planner.micro_batches.decode, workload.sequences),
    }
    record = {
        "schema": SCHEMA,
        "layers": shape.layers,
        "bits": bits,
        "workload": {
            "sequences": workload.sequences,
            "prompt_tokens": workload.prompt_tokens,
            "generated_tokens": workload.generated_tokens,
            "shared_tokens": workload.shared_tokens or 0,
            "unshared_tokens": workload.unshared_tokens or 0,
            "pool_positions": workload.pool_positions or 0,
        },
        "micro_batches": sizes,
        "device_types": {
            name: tabulate_times(
                device_type,
                costs[name],
                (bits, quant.lm_head_bits),
                dtype,
                sizes,
                workload,
                middle_share(cluster, shape),
            )
            for name, device_type in cluster.device_types.items()
        },
        "devices": [
            {"name": device.name, "type": device.type.name, "memory_bytes": device.memory_bytes}
            for device in cluster.devices
        ],
        "device_order": planner.device_order,
        "memory": tabulate_memory(memory, bits, sizes, workload, len(cluster.devices) if captured else 0),
        "links": link_table(cluster, shape, COMPUTE_DTYPES[dtype]),
        "sensitivity": add_head_loss(sensitivity, bits, quant.lm_head_bits),
    }
    record["objective"], raised = _objective(planner, record["sensitivity"], bits)
    notes += raised
    return Prepared(
        Problem.from_json(record),
        dtype,
        memory,
        costs,
        sensitivity,
        _provenance(cluster, costs, sensitivity, kernel, captured),
        tuple(dict.fromkeys([*notes, *(note for cost in costs.values() for note in getattr(cost, "notes", ()))])),
    )


def _has_cpus(cluster: Cluster) -> bool:
    return any(device_type.kind == "cpu" for device_type in cluster.device_types.values())


def check_workload(workload: WorkloadConfig, shape: ModelShape) -> None:
    """UserError: a count below 1, prompt + generated tokens beyond the model's positions, a shared prefix that leaves
    nothing of a prompt, or a negative number of unshared tokens."""
    for name in ("sequences", "prompt_tokens", "generated_tokens"):
        value = getattr(workload, name)
        if value is None or value < 1:
            raise UserError(f"workload.{name}={value}; it must be at least 1")
    if not 0 <= (workload.shared_tokens or 0) < workload.prompt_tokens:
        raise UserError(
            f"workload.shared_tokens={workload.shared_tokens}; it must be from 0 to {workload.prompt_tokens - 1}, one "
            "less than workload.prompt_tokens"
        )
    for name in ("unshared_tokens", "pool_positions"):
        if (getattr(workload, name) or 0) < 0:
            raise UserError(f"workload.{name}={getattr(workload, name)}; it must be 0 or more")
    if not 0 <= (workload.drawn_share or 0.0) <= 1:
        raise UserError(f"workload.drawn_share={workload.drawn_share}; it must be from 0 to 1")
    length = workload.prompt_tokens + workload.generated_tokens
    if shape.max_positions is not None and length > shape.max_positions:
        raise UserError(
            f"prompt_tokens + generated_tokens = {length} exceeds the model's {shape.max_positions} positions; "
            f"lower one of them by {length - shape.max_positions}"
        )


def usable_bits(shape: ModelShape, quant: QuantConfig) -> tuple[list[int], list[str]]:
    """(bit widths of `quant.bits` that every linear of a layer can be stored in, one note for each bit width left out).

    UserError: an unknown or doubled bit width, none left, or `quant.per_channel_bits` that cannot be.
    """
    if not quant.bits:
        raise UserError(f"quant.bits is empty; list widths of {', '.join(map(str, BIT_WIDTHS))}")
    kept, notes = [], []
    for width in quant.bits:
        if width not in BIT_WIDTHS or quant.bits.count(width) > 1:
            raise UserError(
                f"quant.bits={list(quant.bits)}: list each width once, of {', '.join(map(str, BIT_WIDTHS))}"
            )
        reason = next((why for linear in shape.linears if (why := _why_not(linear, width, quant))), None)
        if reason:
            notes.append(reason)
        else:
            kept.append(width)
    if not kept:
        raise UserError(
            f"no bit width of quant.bits={list(quant.bits)} is usable, e.g. {notes[0]}; add {UNQUANTIZED_BITS}"
        )
    return kept, notes


def add_head_loss(sensitivity: Sensitivity, bits: list[int], lm_head_bits: int) -> list[list[float]]:
    """Layers x `bits`. What lm_head loses is the same in every plan, and charged to the last layer, which is
    in every plan: so it counts against a bound on the loss. UserError: a bit width that sensitivity does not know."""
    *others, last = sensitivity.select_bits(bits)
    return [*map(list, others), [value + sensitivity.head_loss(lm_head_bits) for value in last]]


def micro_batches(phase: str, given: list[int] | None, sequences: int) -> list[int]:
    """Candidate sizes: the given ones, or powers of two below `sequences` and `sequences` itself."""
    if given is None:
        return [*(1 << power for power in range((sequences - 1).bit_length())), sequences]
    if not given:
        raise UserError(f"planner.micro_batches.{phase} is empty; list sizes from 1 to {sequences}, or null for all")
    for size in given:
        if not 1 <= size <= sequences or given.count(size) > 1:
            raise UserError(f"planner.micro_batches.{phase}={list(given)}: list each size once, from 1 to {sequences}")
    return list(given)


def _why_not(linear: Any, width: int, quant: QuantConfig) -> str | None:
    reason = find_quantization_problem(linear.out_features, linear.in_features, width, make_groups(quant))
    return f"{width} bits is left out: {linear.name} cannot be packed ({reason})" if reason else None


def _without_head(cluster: Cluster, lm_head_bits: int) -> list[str]:
    """A note for each device type that cannot hold lm_head. UserError: none can."""
    types = cluster.device_types.values()
    found = [f"{entry.name} has no kernel for quant.lm_head_bits={lm_head_bits}" for entry in types
             if not holds_head(entry, lm_head_bits)]  # fmt: skip
    if len(found) == len(types):
        widths = sorted({width for entry in types for width in entry.bits} | {UNQUANTIZED_BITS})
        raise UserError(
            f"quant.lm_head_bits={lm_head_bits}, but no device type of the cluster has that bit width; use one of "
            f"{', '.join(map(str, widths))}"
        )
    return found


def _objective(
    planner: PlannerConfig, sensitivity: list[list[float]], bits: list[int]
) -> tuple[dict[str, Any], list[str]]:
    """(the objective, a note where more may be lost than `planner.max_quality_loss`). In mode theta that bounds
    what is lost beyond what `quant.bits`, `quant.lm_head_bits` and the pins cost anyway: these were asked for."""
    mode, limit = planner.mode, planner.max_quality_loss
    if mode == "pareto" or (mode == "theta" and limit is None):  # the front takes the objective's place
        return {"mode": "theta", "theta": planner.theta}, []
    if mode == "theta":
        pinned = planner.pins.get("bits") or {}
        pinned = {str(layer): width for layer, width in pinned.items()} if isinstance(pinned, Mapping) else {}
        least = math.fsum(
            row[bits.index(pinned[str(layer)])] if pinned.get(str(layer)) in bits else min(row)
            for layer, row in enumerate(sensitivity)
        )
        objective = {"mode": "max_quality_loss", "theta": planner.theta, "limit": limit + least}
        return objective, [
            f"quant.bits={bits}, quant.lm_head_bits and pins lose {format_number(least)} nats per token at least; "
            f"planner.max_quality_loss={format_number(limit)} bounds what comes on top of that."
        ] * (least > 0)
    if mode not in ("max_quality_loss", "max_latency"):
        raise UserError(f"planner.mode={mode!r}; use theta, max_quality_loss, max_latency or pareto")
    field = "max_quality_loss" if mode == "max_quality_loss" else "max_latency_seconds"
    if (limit := getattr(planner, field)) is None:
        raise UserError(f"planner.mode={mode} needs a bound; set planner.{field}")
    return {"mode": mode, "limit": limit}, []


def _provenance(
    cluster: Cluster, costs: Mapping[str, LayerCosts], sensitivity: Sensitivity, kernel: Kernel, captured: bool
) -> dict[str, str]:
    """Origin of each group of numbers, as a plan reports it."""
    origins = {
        f"layer_seconds.{name}": f"{costs[name].provenance} (kernel {kernel.name}; rates {device_type.source})"
        for name, device_type in cluster.device_types.items()
    }
    return {
        **origins,
        "kernel": f"{kernel.name}: {kernel.source}",
        "memory_bytes": "arithmetic (weights, kv, embed, head as allocated; workspace estimated)"
        + ("; captured graphs estimated, not measured, in the workspace" if captured else ""),
        "links": cluster.links.source,
        "sensitivity": f"{sensitivity.provenance} ({sensitivity.method})",
    }
