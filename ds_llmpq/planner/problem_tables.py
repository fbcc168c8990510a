"""The tables of a planning problem: seconds of a device type, bytes of a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ds_llmpq.cluster.cluster import Cluster, gate
from ds_llmpq.cluster.devices import DeviceType
from ds_llmpq.cost.captured_graphs import estimate_graph_bytes
from ds_llmpq.cost.latency import LayerCosts
from ds_llmpq.cost.memory import MemoryModel
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.plan import Workload
from ds_llmpq.planner.config import WorkloadConfig
from ds_llmpq.quant.packing import UNQUANTIZED_BITS


def middle_share(cluster: Cluster, shape: ModelShape) -> float:
    """Middle stages a decoder layer, if every device gets a stage: what a pass costs such a stage beside its layers
    is spread over all layers, for the problem's formula has no cost of a stage as such."""
    return max(0, min(len(cluster.devices), shape.layers) - 2) / shape.layers


def tabulate_times(
    device_type: DeviceType,
    costs: LayerCosts,
    widths: tuple[list[int], int],
    dtype: str,
    sizes: Mapping[str, list[int]],
    workload: WorkloadConfig,
    middle: float,
) -> dict[str, Any]:
    """Tables of one device type, for layers and lm_head at `widths`. Decode is costed at the mean length: the
    prompt and half of what is generated.

    What a pass costs beside its layers goes to the end stages with embedding and head, and `middle` of a middle
    stage's to every layer; contention among them.
    """
    past = workload.prompt_tokens + workload.generated_tokens / 2
    prompt = workload.prefill_tokens
    over = {
        "prefill": {size: costs.pass_overhead("prefill", size, prompt) for size in sizes["prefill"]},
        "decode": {size: costs.pass_overhead("decode", size, 1) for size in sizes["decode"]},
    }

    def layers(phase: str, seconds: Callable[[int], float | None]) -> dict[str, float | None]:
        found = {size: seconds(size) for size in sizes[phase]}
        return {
            str(size): None
            if time is None
            else time + middle * (over[phase][size].middle + over[phase][size].contention)
            for size, time in found.items()
        }

    def embed(phase: str, size: int) -> float:
        seconds = costs.embed_seconds(size, prompt if phase == "prefill" else 1)
        return seconds + over[phase][size].first + over[phase][size].contention

    def head(phase: str, size: int) -> float:
        return costs.head_seconds(size) + over[phase][size].last + over[phase][size].contention

    bits, lm_head_bits = widths
    feasible = [width for width in bits if gate(device_type, width, dtype) is None]
    with_head = {phase: sizes[phase] if holds_head(device_type, lm_head_bits) else [] for phase in sizes}
    return {
        "bits": feasible,
        "prefill_layer_seconds": {
            str(width): layers("prefill", lambda size, width=width: _prefill_seconds(costs, width, size, workload))
            for width in feasible
        },
        "decode_layer_seconds": {
            str(width): layers("decode", lambda size, width=width: costs.decode_seconds(width, size, past))
            for width in feasible
        },
        **{f"{phase}_embed_seconds": {str(size): embed(phase, size) for size in sizes[phase]} for phase in sizes},
        **{f"{phase}_head_seconds": {str(size): head(phase, size) for size in with_head[phase]} for phase in sizes},
        "contention_seconds": max(entry.contention for entry in over["decode"].values()),
        **{f"{phase}_alone_share": costs.alone_share(phase) for phase in sizes},
        **{f"{phase}_error": costs.time_error(phase) for phase in sizes},
    }


def _prefill_seconds(costs: LayerCosts, width: int, size: int, workload: WorkloadConfig) -> float | None:
    """Behind a shared prefix: whole prompts less prompts of the prefix alone, which leaves what attention to the prefix
    costs, but the reading of weights out: so never less than prompts of what is computed."""
    whole = costs.prefill_seconds(width, size, workload.prompt_tokens)
    if not workload.shared_tokens or whole is None:
        return whole
    prefix = costs.prefill_seconds(width, size, workload.shared_tokens)
    return max(whole - prefix, costs.prefill_seconds(width, size, workload.prefill_tokens))


def holds_head(device_type: DeviceType, lm_head_bits: int) -> bool:
    """Any type does at 16 bits, whatever the bit widths of its layers."""
    return lm_head_bits == UNQUANTIZED_BITS or lm_head_bits in device_type.bits


def tabulate_memory(
    memory: MemoryModel, bits: list[int], sizes: Mapping[str, list[int]], workload: WorkloadConfig, capturing: int
) -> dict[str, Any]:
    """`capturing`: so many devices capture decode passes; graphs are then counted in the workspace, those of an even
    share of layers and of one decode group a device. Their own memory is held while prefill works in its."""
    capacity, shared = workload.prompt_tokens + workload.generated_tokens, workload.shared_tokens or 0
    planned = Workload(
        workload.sequences, workload.prompt_tokens, workload.generated_tokens, shared, workload.unshared_tokens or 0,
        workload.pool_positions or 0,
    )  # fmt: skip
    paged = planned.pool_positions > 0
    block = memory.kernel.block_positions(paged)
    quantized = any(width != UNQUANTIZED_BITS for width in bits)
    # a prompt without the prefix passes whole, alone
    one = memory.workspace_bytes(1, workload.prompt_tokens, 0, quantized)
    behind = {
        s: memory.workspace_bytes(s, workload.prefill_tokens, shared, quantized)
        + memory.prefix_bytes(s, workload.prefill_tokens, shared, workload.prompt_tokens)
        for s in sizes["prefill"]
    }
    prefill = {s: max(one, value) for s, value in behind.items()}
    apart = {s: memory.prefix_bytes(s, 1, shared, capacity) for s in sizes["decode"]}
    if paged:  # a prefix is then in all rows' blocks
        apart = {s: 0 if capturing else memory.gathered_bytes(s, capacity) for s in sizes["decode"]}
    decode = {s: memory.workspace_bytes(s, 1, capacity - 1, quantized) + apart[s] for s in sizes["decode"]}
    if capturing:
        rows, layers = -(-workload.sequences // capturing), -(-memory.shape.layers // capturing)
        graphs = estimate_graph_bytes(layers, workload.sequences, rows, capacity, shared > 0, paged)
        pool = {s: memory.captured_pool_bytes(s, capacity - 1, quantized) + apart[s] for s in sizes["decode"]}
        prefill = {s: value + graphs + max(pool.values()) for s, value in prefill.items()}
        decode = {s: value + graphs + pool[s] for s, value in decode.items()}
    return {
        "layer_bytes": {str(width): memory.layer_bytes(width) for width in bits},
        # an even share of all, for the prefix and the blocks of a pool are nobody's own
        "kv_bytes_per_sequence_layer": memory.kv_bytes_per_sequence_layer(
            planned.cache_positions(block) + planned.prefix_positions(block)
        )
        / workload.sequences,
        "embed_bytes": memory.embed_bytes(),
        "head_bytes": memory.head_bytes(),
        "tied_head": memory.shares_embedding,
        "tied_bytes": memory.tied_bytes,
        "workspace_bytes": {
            "prefill": {str(size): value for size, value in prefill.items()},
            "decode": {str(size): value for size, value in decode.items()},
        },
    }
