"""Memory arithmetic against what real modules hold and allocate."""

import inspect

import pytest

from ds_llmpq.cost.memory import MemoryModel
from ds_llmpq.models.families import describe
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.quant.kernels.openvino import OPENVINO_GRAPH
from ds_llmpq.quant.packing import Groups
from ds_llmpq.research.published_costs import KERNEL

CONFIGS = {
    "llama": {"model_type": "llama", "intermediate_size": 512, "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", "intermediate_size": 192, "num_key_value_heads": 2, "head_dim": 64},
    "opt": {"model_type": "opt", "ffn_dim": 1024},
    "bloom": {"model_type": "bloom"},
}
COMMON = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}


def config_of(name):
    return {**COMMON, **CONFIGS[name]}


def model_of(name):
    transformers = pytest.importorskip("transformers")
    options = config_of(name)
    config = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def peak_bytes(action):
    """Most bytes that torch's CPU allocator holds for `action` beyond what it held before."""
    import torch

    with torch.no_grad():
        action()
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profile:
            action()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("name", CONFIGS)
def test_kv_bytes_are_those_of_a_real_cache(name):
    import torch
    from transformers import DynamicCache

    model, cache = model_of(name), DynamicCache()
    takes = inspect.signature(model.forward).parameters
    argument = "cache" if "cache" in takes else "past_key_values"  # up to transformers 5.23 the second
    with torch.no_grad():
        model(torch.zeros(3, 17, dtype=torch.long), **{argument: cache})
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    memory = MemoryModel(ModelShape.from_config(config_of(name)), Groups(), 4)
    assert 2 * 3 * memory.kv_bytes_per_sequence_layer(17) == held


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("sequences", "tokens"), [(4, 128), (1, 384)])
def test_activations_bound_what_a_forward_pass_allocates(name, dtype, sequences, tokens):
    """The reference is a pass through embedding and layers: it also keeps the embedding's outcome beside the layer's
    set."""
    import torch

    from ds_llmpq.models.decoder import Decoder
    from ds_llmpq.models.step import Step

    decoder = Decoder(describe(config_of(name)))
    modules = [decoder.embedding(), *(decoder.layer(index) for index in range(2))]
    for module in modules:
        module.to(getattr(torch, dtype)).requires_grad_(False)
        for parameter in module.parameters():
            parameter.fill_(0.01)
    shape, size = ModelShape.from_config(config_of(name)), {"float32": 4, "bfloat16": 2}[dtype]
    ids, positions = torch.zeros(sequences, tokens, dtype=torch.long), torch.arange(tokens).expand(sequences, -1)

    def forward():
        step = Step(positions, None, tokens, True, token_ids=ids, prepare=decoder.positions())
        for module in modules:
            step = module(step)

    held = peak_bytes(forward)
    predicted = MemoryModel(shape, Groups(), size).workspace_parts(sequences, tokens, 0, False)["activations"]
    embeddings = 2 * sequences * tokens * shape.hidden * size
    kernel = 1 << 16  # the fused attention's own buffers, by threads and not by rows
    assert predicted + embeddings + kernel >= held
    assert predicted <= 1.5 * held


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_dequantized_is_what_hqq_allocates(bits):
    import torch

    quantize = pytest.importorskip("hqq.core.quantize")
    shape = ModelShape.from_config(config_of("llama"))
    largest = max(shape.linears, key=lambda linear: linear.weights)
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    config["weight_quant_params"]["optimize"] = False
    plain = torch.nn.Linear(largest.in_features, largest.out_features, bias=False)
    linear = quantize.HQQLinear(plain, config, compute_dtype=torch.float32, device="cpu")
    held = peak_bytes(lambda: linear(torch.zeros(1, largest.in_features)))
    assert held == pytest.approx(
        MemoryModel(shape, Groups(), 4).workspace_parts(1, 1, 0, True)["dequantized"], rel=0.02
    )


@pytest.mark.parametrize("dtype_bytes", [2, 4])
def test_unquantized_parts_add_up_to_the_model(dtype_bytes):
    for name in CONFIGS:
        config = {**config_of(name), "tie_word_embeddings": False}
        shape = ModelShape.from_config(config)
        memory = MemoryModel(shape, Groups(), dtype_bytes)
        held = shape.layers * memory.layer_bytes(16) + memory.embed_bytes() + memory.head_bytes()
        assert held == shape.parameters * dtype_bytes


def test_layer_bytes_by_hand():
    """Llama, hidden 256: 4 bits pack two weights a byte, with a scale and a zero of 2 bytes per 64 weights."""
    shape = ModelShape.from_config(config_of("llama"))
    memory = MemoryModel(shape, Groups(), 2)
    weights = shape.linear_weights
    assert memory.layer_bytes(4) == weights // 2 + weights // 64 * 4 + 2 * 256 * 2
    assert memory.layer_bytes(16) == weights * 2 + 2 * 256 * 2
    assert memory.layer_bytes(2) < memory.layer_bytes(3) < memory.layer_bytes(4) < memory.layer_bytes(8)


def test_workspace_takes_the_larger_of_layer_and_logits():
    shape = ModelShape.from_config({**config_of("llama"), "vocab_size": 1_000_000})
    memory = MemoryModel(shape, Groups(), 2)
    parts = memory.workspace_parts(8, 1, 100, True)
    assert parts["logits"] > parts["activations"] + parts["dequantized"]
    assert memory.workspace_bytes(8, 1, 100, True) == parts["logits"] + parts["communication"]
    assert MemoryModel(shape, Groups(), 2, KERNEL).workspace_parts(8, 1, 100, True)["dequantized"] == 0
    assert memory.workspace_parts(8, 1, 100, False)["dequantized"] == 0
    graph = MemoryModel(shape, Groups(), 2, OPENVINO_GRAPH)
    parts = graph.workspace_parts(8, 1, 100, True)
    assert graph.workspace_bytes(8, 1, 100, True) == sum(parts.values()), "their buffers stay"
