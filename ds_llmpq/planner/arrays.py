"""One micro-batch pair of a problem as numpy arrays: what the solvers compute with.

D devices, L layers, B bit widths. An unavailable time is infinite. The judge of every plan stays `objective.py`.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ds_llmpq.planner.objective import rounds
from ds_llmpq.planner.problem import DeviceSpeeds, Problem


@dataclass(frozen=True)
class PairArrays:
    """The problem for one prefill and one decode micro-batch size."""

    prefill_micro_batch: int
    decode_micro_batch: int
    prefill_rounds: int  # m_p
    decode_rounds: int  # m_d
    generated_tokens: int  # n
    prefill: np.ndarray  # [D, B] seconds of one layer
    decode: np.ndarray  # [D, B]
    embed: np.ndarray  # [2, D] seconds: prefill, decode
    head: np.ndarray  # [2, D]
    capacity: np.ndarray  # [D] bytes left after the workspace
    layer_bytes: np.ndarray  # [L, B] weights and KV of one layer
    embed_bytes: float
    head_bytes: float
    tied_head: bool
    tied_bytes: float | None
    link: np.ndarray  # [2, D, D] seconds from device to device: prefill, decode
    back: np.ndarray  # [2, D, D] seconds of the token's way back: prefill, decode
    sensitivity: np.ndarray  # [L, B]

    @cached_property
    def available(self) -> np.ndarray:
        """[D, B]: the device can run the bit width at both micro-batch sizes."""
        return np.isfinite(self.prefill) & np.isfinite(self.decode)


def pair_arrays(problem: Problem, prefill_micro_batch: int, decode_micro_batch: int) -> PairArrays:
    """The problem at one pair of micro-batch sizes, filled once and not to be written to. Times are those of stages
    beside others, unless there is only one device."""
    pair = prefill_micro_batch, decode_micro_batch
    if pair not in problem.arrays:
        problem.arrays[pair] = _fill(problem, *pair)
    return problem.arrays[pair]


def _fill(problem: Problem, prefill_micro_batch: int, decode_micro_batch: int) -> PairArrays:
    types = [problem.device_types[device.type] for device in problem.devices]
    memory, workload, links = problem.memory, problem.workload, problem.links
    m_p, m_d = rounds(problem, prefill_micro_batch, decode_micro_batch)

    alone = len(types) == 1
    shares = [getattr(types[0], f"{phase}_alone_share") if alone else 1.0 for phase in ("prefill", "decode")]
    contention = types[0].contention_seconds if alone else 0.0

    def part(name: str) -> np.ndarray:
        times = [[getattr(t, f"{phase}_{name}_seconds").get(size, np.inf) for t in types] for phase, size in sizes]
        return (np.array(times) - contention) * np.array(shares)[:, None]

    sizes = (("prefill", prefill_micro_batch), ("decode", decode_micro_batch))
    workspace = max(
        memory.workspace_bytes.prefill[prefill_micro_batch], memory.workspace_bytes.decode[decode_micro_batch]
    )
    kv = memory.kv_bytes_per_sequence_layer * workload.sequences
    names = [device.name for device in problem.devices]
    latency = np.full((len(names),) * 2, links.default.latency_seconds)
    per_byte = np.full((len(names),) * 2, links.default.seconds_per_byte)
    index = {name: i for i, name in enumerate(names)}
    for (sender, receiver), link in links.pairs.items():
        latency[index[sender], index[receiver]] = link.latency_seconds
        per_byte[index[sender], index[receiver]] = link.seconds_per_byte
    hidden, prompt_rows = links.hidden_bytes_per_token, prefill_micro_batch * workload.prefill_tokens
    return PairArrays(
        prefill_micro_batch=prefill_micro_batch,
        decode_micro_batch=decode_micro_batch,
        prefill_rounds=m_p,
        decode_rounds=m_d,
        generated_tokens=workload.generated_tokens,
        prefill=shares[0] * np.array([_layer_times(problem, t, "prefill", prefill_micro_batch) for t in types]),
        decode=shares[1] * np.array([_layer_times(problem, t, "decode", decode_micro_batch) for t in types]),
        embed=part("embed"),
        head=part("head"),
        capacity=np.array([device.memory_bytes - workspace for device in problem.devices], dtype=float),
        layer_bytes=np.array([memory.layer_bytes[b] for b in problem.bits], dtype=float).T + kv,
        embed_bytes=float(memory.embed_bytes),
        head_bytes=float(memory.head_bytes),
        tied_head=memory.tied_head,
        tied_bytes=memory.tied_bytes,
        link=np.stack([latency + rows * hidden * per_byte for rows in (prompt_rows, decode_micro_batch)]),
        back=np.stack([latency + size * links.token_bytes * per_byte for _, size in sizes]),
        sensitivity=np.array(problem.sensitivity, dtype=float),
    )


def _layer_times(problem: Problem, entry: DeviceSpeeds, phase: str, size: int) -> list[float]:
    table = getattr(entry, f"{phase}_layer_seconds")
    return [table.get(bits, {}).get(size, np.inf) if bits in entry.bits else np.inf for bits in problem.bits]
