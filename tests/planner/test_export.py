"""A plan as other systems' arguments: cuts, widths and devices are all there, and read back the same."""

import re
from dataclasses import replace

import pytest

from ds_llmpq.errors import UserError
from ds_llmpq.plan import (
    Deployment,
    MicroBatches,
    Plan,
    PlannedModel,
    PredictedTotals,
    Quantization,
    SolverReport,
    Stage,
    StageMemory,
    Workload,
)
from ds_llmpq.planner.export import export, layers_by_width

_MEMORY = StageMemory(0.0, 0.0, 0.0, 0.0, 0.0)
_PREDICTED = PredictedTotals(1.0, 1.0, 1.0, 1.0, 1.0)


def stage(rank, host, slot, layers, bits):
    return Stage(rank, host, f"{host}:{slot}", "t4", layers, tuple(bits), "fused", _MEMORY, 9.0, 1.0, 1.0)


def plan(kind="cuda", architecture="llama"):
    stages = (
        stage(0, "a", 1, (0, 3), (4, 4, 8)),
        stage(2, "b", 0, (3, 5), (16, 4)),
        stage(1, "a", 0, (5, 6), (4,)),
    )
    stages = tuple(replace(each, kind=kind, slot=slot) for each, slot in zip(stages, (1, 0, 0), strict=True))
    model = PlannedModel("/models/x", architecture, "f")
    solver = SolverReport("search", 1.0, 1.0, 0.0, 0.1, "optimal")
    sizes = MicroBatches(1, 2)
    return Plan(
        model,
        Workload(4, 8, 8),
        stages,
        sizes,
        _PREDICTED,
        solver,
        deployment=Deployment("float16"),
        quant=Quantization(),
    )


def test_vllm_gets_the_cuts_and_each_layers_width():
    made = export(plan(), "vllm")
    assert made.lines == ("VLLM_PP_LAYER_PARTITION=3,2,1 vllm serve /models/x --pipeline-parallel-size 3",)
    config = made.record["quantization_config"]
    assert (config["bits"], config["group_size"]) == (4, 64)
    found = []
    for layer in range(6):
        name, bits = f"model.layers.{layer}.mlp.down_proj", config["bits"]
        for rule, override in config["dynamic"].items():
            if re.match(rule[2:], name):
                bits = 16 if rule.startswith("-:") else override["bits"]
        found.append(bits)
    assert found == made.record["layer_bits"] == [4, 4, 8, 16, 4, 4]


def test_per_channel_are_group_size_minus_one_to_gptq():
    quant = Quantization(per_channel_bits=(8,))
    config = export(replace(plan(), quant=quant), "vllm").record["quantization_config"]
    assert config["group_size"] == 64
    assert {"bits": 8, "group_size": -1} in config["dynamic"].values()
    config = export(replace(plan(), quant=replace(quant, per_channel_bits=(4,))), "vllm").record["quantization_config"]
    assert config["group_size"] == -1
    assert {"bits": 8, "group_size": 64} in config["dynamic"].values()


def test_layers_one_and_eleven_are_told_apart():
    config = export(plan(), "vllm").record["quantization_config"]
    rule = next(iter(config["dynamic"]))[2:]
    assert re.match(rule, "model.layers.2.mlp.up_proj")
    assert not re.match(rule, "model.layers.12.mlp.up_proj")
    assert not re.match(rule, "model.layers.22.mlp.up_proj")


def test_widths_that_vllm_has_no_kernel_for_are_said():
    odd = plan()
    odd = replace(odd, stages=(replace(odd.stages[0], bits=(3, 3, 3)), *odd.stages[1:]))
    assert any("not 3" in note for note in export(odd, "vllm").notes)
    full = replace(odd, stages=tuple(replace(s, bits=(16,) * len(s.bits)) for s in odd.stages))
    assert export(full, "vllm").record["quantization_config"] is None


def test_llama_cpp_gets_types_split_and_devices():
    made = export(plan(), "llama_cpp")
    quantize, run = made.lines
    assert quantize.startswith("llama-quantize --tensor-type ")
    assert quantize.endswith("MODEL-F16.gguf MODEL.gguf Q4_K")
    types = dict(entry.rsplit("=", 1) for entry in re.findall(r"--tensor-type '([^']*)'", quantize))
    for layer, expected in enumerate(["q4_k", "q4_k", "q8_0", "f16", "q4_k", "q4_k"]):
        name = f"blk.{layer}.ffn_down.weight"
        assert next((kind for rule, kind in types.items() if re.search(rule, name)), "q4_k") == expected
    assert "--tensor-split 3,2,2" in run, "the output counts as a layer of the last stage"
    assert "--device CUDA1,RPC0,CUDA0" in run
    pins = dict(entry.rsplit("=", 1) for entry in made.record["override_tensor"])
    placed = [next(d for rule, d in pins.items() if re.search(rule, f"blk.{i}.attn_q.weight")) for i in range(6)]
    assert placed == ["CUDA1"] * 3 + ["RPC0"] * 2 + ["CUDA0"]


def test_llama_cpp_cuts_no_processor():
    made = export(plan(kind="cpu"), "llama_cpp")
    assert "--tensor-split" not in made.lines[1]
    assert any("one device" in note for note in made.notes)


def test_deepspeed_gets_the_cuts_and_a_configuration():
    made = export(plan(), "deepspeed")
    decoder = [0, *(stage.layers[1] for stage in plan().stages)]
    assert made.record["decoder_parts"] == decoder
    assert made.record["parts"] == [0, *(cut + 1 for cut in decoder[1:-1]), decoder[-1] + 2]
    config = made.record["ds_config"]
    sizes = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    assert config["train_batch_size"] == sizes >= plan().workload.sequences
    assert config["pipeline"] == {"stages": len(plan().stages)}
    assert made.lines[0].startswith("deepspeed --hostfile hostfile --include ")


def test_what_cannot_be_said_is_refused():
    with pytest.raises(UserError, match="vllm, llama_cpp"):
        export(plan(), "tgi")
    odd = replace(plan(), stages=(stage(0, "a", 0, (0, 2), (1, 1)),))
    with pytest.raises(UserError, match="1 bits"):
        export(odd, "llama_cpp")


def test_layers_by_width_begins_with_the_commonest():
    assert layers_by_width(plan()) == {4: [0, 1, 4, 5], 8: [2], 16: [3]}


def test_a_low_bit_lm_head_is_said_to_stay_behind():
    low = replace(plan(), quant=Quantization(lm_head_bits=8))
    for target in ("vllm", "llama_cpp"):
        assert export(low, target).notes[-1] == "lm_head at 8 bits is not carried over."
        assert not any("lm_head" in note for note in export(plan(), target).notes)
