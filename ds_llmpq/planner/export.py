"""A plan in the words of other systems: vLLM's layer partition and GPTQ overrides, llama.cpp's arguments.

Cuts carry over exactly and bit widths as far as the other system has them; the schedule, the micro-batches and the
predicted times are this engine's own. What does not carry over is said in `notes`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ds_llmpq.cluster.hostfile import format_include
from ds_llmpq.errors import UserError
from ds_llmpq.models.families import find_family
from ds_llmpq.plan import Plan, Quantization, Stage, launch_order
from ds_llmpq.quant.packing import UNQUANTIZED_BITS

TARGETS = ("vllm", "llama_cpp", "deepspeed")
_GGML = {16: "f16", 8: "q8_0", 4: "q4_k", 3: "q3_k", 2: "q2_k"}
_VLLM_BITS = (4, 8)  # of its GPTQ kernels
_EVERY_LAYER = 999  # more than any model has: all layers, and the output


@dataclass(frozen=True)
class Export:
    """`record`: what is written as JSON; `lines`: shell lines to print and write."""

    record: dict[str, object]
    lines: tuple[str, ...]
    notes: tuple[str, ...]


def export(plan: Plan, to: str) -> Export:
    """UserError: an unknown target, or a plan that it cannot express at all."""
    if to not in TARGETS:
        raise UserError(f"to={to!r}; export knows {', '.join(TARGETS)}")
    found = {"vllm": _vllm, "llama_cpp": _llama_cpp, "deepspeed": _deepspeed}[to](plan)
    widths = {"lm_head": plan.lm_head_bits, "the KV cache": plan.kv_bits}
    notes = (f"{part} at {bits} bits is not carried over." for part, bits in widths.items() if bits < UNQUANTIZED_BITS)
    return replace(found, notes=(*found.notes, *notes))


def layers_by_width(plan: Plan) -> dict[int, list[int]]:
    """Width -> its decoder layers, the most frequent bit width first."""
    bits = [width for stage in plan.stages for width in stage.bits]
    order = [width for width, _ in Counter(bits).most_common()]
    return {width: [layer for layer, own in enumerate(bits) if own == width] for width in order}


def _vllm(plan: Plan) -> Export:
    partition = ",".join(str(stage.layers[1] - stage.layers[0]) for stage in plan.stages)
    widths = layers_by_width(plan)
    path = plan.model_path or "MODEL"
    quantized = [width for width in widths if width != 16]
    notes = [
        *_order_notes(plan),
        "vLLM runs stages on ranks 0, 1, ... in the order given; start them on those devices.",
    ]
    record: dict[str, object] = {
        "environment": {"VLLM_PP_LAYER_PARTITION": partition},
        "pipeline_parallel_size": len(plan.stages),
        "layer_bits": [width for stage in plan.stages for width in stage.bits],
        "quantization_config": None,
    }
    if quantized:
        base = quantized[0]
        record["quantization_config"] = _gptq(plan, widths, base)
        notes.append(
            "quantization_config is what a GPTQ checkpoint with these widths declares (quantize with GPTQModel's "
            "`dynamic`); HQQ checkpoints of `ds-llmpq quantize` are not read by vLLM."
        )
        if unknown := [width for width in quantized if width not in _VLLM_BITS]:
            notes.append(
                f"vLLM's GPTQ kernels know 4 and 8 bits, not {', '.join(map(str, unknown))}; plan with "
                "quant.bits=[4,8,16] for vLLM."
            )
    line = f"VLLM_PP_LAYER_PARTITION={partition} vllm serve {path} --pipeline-parallel-size {len(plan.stages)}"
    return Export(record, (line,), tuple(notes))


def _gptq(plan: Plan, widths: dict[int, list[int]], base: int) -> dict[str, object]:
    """GPTQ's `dynamic`: "+:" overrides a module, "-:" leaves it unquantized."""
    family = find_family(plan.model.architecture if plan.model else None)
    # without the first part of the name, which vLLM leaves out
    blocks = re.escape(family.layers.partition(".")[2]) if family else "layers"
    dynamic: dict[str, dict[str, int]] = {}
    groups = {width: _gptq_group(plan, width) for width in widths}
    for width, layers in widths.items():
        if width != base:
            name = rf".*\.{blocks}\.({'|'.join(map(str, layers))})\..*"
            other = {"group_size": groups[width]} if groups[width] != groups[base] else {}
            dynamic[f"-:{name}" if width == 16 else f"+:{name}"] = {} if width == 16 else {"bits": width, **other}
    return {
        "quant_method": "gptq",
        "bits": base,
        "group_size": groups[base],
        "desc_act": False,
        "sym": True,
        "dynamic": dynamic,
    }


def _gptq_group(plan: Plan, width: int) -> int:
    """-1 is GPTQ's word for per-channel groups."""
    quant = plan.quant or Quantization()
    return -1 if width in quant.per_channel_bits else quant.group_size


def _deepspeed(plan: Plan) -> Export:
    """For a user's own PipelineModule: where it is cut, and the configuration that trains it on the plan's devices."""
    micro_batch = plan.micro_batch.prefill
    steps = -(-plan.workload.sequences // micro_batch)
    dtype = plan.deployment.compute_dtype if plan.deployment else None
    ds_config: dict[str, object] = {
        "train_batch_size": micro_batch * steps,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": steps,
        "pipeline": {"stages": len(plan.stages)},
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
    }
    include = format_include(launch_order(plan))
    record: dict[str, object] = {
        "parts": plan.parts(before=1, after=1),
        "decoder_parts": plan.parts(),
        "ranks": [stage.rank for stage in plan.stages],
        "ds_config": ds_config,
    }
    line = f"deepspeed --hostfile hostfile --include {include} train.py --deepspeed --deepspeed_config ds_config.json"
    notes = (
        *_order_notes(plan),
        "parts: one layer before the decoder layers (the embedding) and one after them; give PlannedPipelineModule "
        "plan=, before= and after= for others (docs/deepspeed.md).",
        "Bit widths are not carried over, and the plan's memory is that of serving: gradients and optimizer states "
        "come on top of it when you train.",
    )
    return Export(record, (line,), notes)


def _llama_cpp(plan: Plan) -> Export:
    widths = layers_by_width(plan)
    if unknown := [width for width in widths if width not in _GGML]:
        raise UserError(f"llama.cpp has no type for {unknown[0]} bits; plan with quant.bits=[2,3,4,8,16] or fewer")
    base = next(iter(widths))
    types = [f"--tensor-type '{_blocks(layers)}={_GGML[width]}'" for width, layers in widths.items() if width != base]
    quantize = " ".join(["llama-quantize", *types, "MODEL-F16.gguf", "MODEL.gguf", _GGML[base].upper()])
    counts = [stage.layers[1] - stage.layers[0] for stage in plan.stages]
    counts[-1] += 1  # llama.cpp counts the output as one more layer
    devices = [_device(stage, index, plan) for index, stage in enumerate(plan.stages)]
    notes = list(_order_notes(plan))
    record: dict[str, object] = {
        "tensor_types": {_GGML[width]: layers for width, layers in widths.items()},
        "tensor_split": counts,
        "devices": devices,
        "override_tensor": None,
    }
    run = ["llama-server", "-m MODEL.gguf"]
    if plan.is_deployed and plan.stages[0].kind == "cpu":
        notes.append("llama.cpp runs a CPU as one device: cuts between CPU stages have no counterpart there.")
    else:
        pins = [f"{_blocks(range(*stage.layers))}={device}" for stage, device in zip(plan.stages, devices, strict=True)]
        record["override_tensor"] = pins
        split = ",".join(map(str, counts))
        run += [
            f"-ngl {_EVERY_LAYER}",
            "--split-mode layer",
            f"--device {','.join(devices)}",
            f"--tensor-split {split}",
        ]
        notes.append(
            f"--tensor-split places layers and their cache; to pin weights alone: --override-tensor '{','.join(pins)}'."
        )
    notes.append(
        "Types are the nearest of llama.cpp's own; their sizes and losses differ from HQQ's at the same width."
    )
    return Export(record, (quantize, " ".join(run)), tuple(notes))


def _blocks(layers: Iterable[int]) -> str:
    return rf"blk\.({'|'.join(map(str, layers))})\.(attn|ffn)_.*"


def _device(stage: Stage, index: int, plan: Plan) -> str:
    """llama.cpp's name: CUDA<slot> on the first stage's host, RPC<k> (a llama rpc-server) elsewhere."""
    if not plan.is_deployed:
        return f"CUDA{index}"
    first = plan.stages[0].host
    if stage.host != first:
        elsewhere = [other.device for other in plan.stages if other.host != first]
        return f"RPC{elsewhere.index(stage.device)}"
    return f"CUDA{stage.slot}"


def _order_notes(plan: Plan) -> list[str]:
    hosts = {stage.host for stage in plan.stages}
    places = ", ".join(f"{index} on {stage.device} ({stage.device_type})" for index, stage in enumerate(plan.stages))
    notes = [f"Stages: {places}."]
    if len(hosts) > 1:
        notes.append(
            "Stages are on several hosts: vLLM needs Ray or a multi-node launch, llama.cpp an rpc-server each."
        )
    return notes
