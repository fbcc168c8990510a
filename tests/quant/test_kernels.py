"""The table of kernels: what takes what, what is chosen, and what bytes are said to be held."""

import pytest

from ds_llmpq.cost.memory import MemoryModel
from ds_llmpq.cost.products import layer_read_bytes
from ds_llmpq.errors import UserError
from ds_llmpq.models.families import describe
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.kernels import openvino, registry
from ds_llmpq.quant.kernels.base import SHARED_INPUTS, Kernel
from ds_llmpq.quant.kernels.linears import group_linears, layer_bytes, resolve_kernel
from ds_llmpq.quant.packing import Groups
from ds_llmpq.research.published_costs import KERNEL

SHAPE = ModelShape.from_config(
    {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    }
)


class Narrow(Kernel):
    """Of a test: up to 4 bits, held as 4, outputs in sixteens, no per-channel weights."""

    name, source, library = "narrow", "made up", "torch"
    kinds, dtypes = ("cpu",), ("bfloat16",)
    storage_bits = {1: 4, 2: 4, 3: 4, 4: 4}  # noqa: RUF012
    group_sizes, out_multiple, shared_inputs = (32, 64, 128, 256), 16, SHARED_INPUTS


NARROW = Narrow()
KERNELS = registry.KERNELS | {KERNEL.name: KERNEL, NARROW.name: NARROW}
GROUPS, ROWS, WHOLE = Groups(), Groups(64, 1, (8,)), Groups(zeros="whole")


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setitem(registry.KERNELS, NARROW.name, NARROW)


@pytest.fixture
def installed(monkeypatch):
    """Sets which kernels' libraries are there."""

    def only(*names):
        monkeypatch.setattr(Kernel, "version", property(lambda self: "1" if self.name in names else None))

    return only


@pytest.mark.parametrize(
    ("there", "kind", "dtype", "quant", "chosen"),
    [
        (("openvino", "narrow"), "cpu", "bfloat16", {}, "openvino"),
        (("narrow",), "cpu", "bfloat16", {}, "narrow"),
        ((), "cpu", "bfloat16", {}, "dequantize"),
        (("openvino", "narrow"), "cpu", "float32", {}, "dequantize"),  # what is exact in float32
        (("openvino", "narrow"), "cpu", "bfloat16", {"axis": 0}, "dequantize"),
        (("openvino", "narrow"), "cpu", "bfloat16", {"group_size": 16}, "dequantize"),
        (("openvino", "narrow"), "cuda", "float16", {}, "dequantize"),
    ],
)
def test_auto_takes_the_first_that_is_there_and_able(installed, there, kind, dtype, quant, chosen):
    installed(*there)
    assert registry.select_kernel(QuantConfig(**quant), [kind], dtype).kernel == chosen
    assert registry.list_candidates(kind, dtype, QuantConfig(**quant))[0].name == chosen


def test_devices_of_two_kinds_share_only_hqq_s_own_forward(installed):
    installed("openvino", "narrow")
    assert registry.select_kernel(QuantConfig(), ["cpu", "cuda"], "bfloat16").kernel == "dequantize"


@pytest.mark.parametrize(
    ("there", "bfloat16", "quant", "architecture", "batch_invariant", "chosen"),
    [
        (("openvino_graph", "openvino"), True, {}, "qwen3", False, "openvino_graph"),
        (("openvino_graph", "openvino"), True, {"bits": [16]}, "llama", False, "openvino_graph"),
        (("openvino_graph", "openvino"), False, {}, "llama", False, "openvino"),
        (("openvino_graph", "openvino"), True, {}, "gemma2", False, "openvino"),
        (("openvino_graph", "openvino"), True, {}, "mixtral", False, "openvino"),
        (("openvino_graph", "openvino"), True, {"bits": [2, 4]}, "llama", False, "openvino"),
        (("openvino_graph", "openvino"), True, {}, "llama", True, "openvino"),
        ((), True, {}, "llama", False, "dequantize"),
    ],
)
def test_auto_takes_whole_stages_where_they_can_be_had(
    installed, monkeypatch, there, bfloat16, quant, architecture, batch_invariant, chosen
):
    installed(*there)
    instructions = frozenset({"avx2", "avx512_bf16"} if bfloat16 else {"avx2"})
    monkeypatch.setattr(openvino, "_instructions", lambda: instructions)
    spec, quant = spec_of(architecture), QuantConfig(**quant)
    found = registry.select_kernel(quant, ["cpu"], "bfloat16", spec=spec, batch_invariant=batch_invariant)
    assert found.kernel == chosen


@pytest.mark.parametrize(
    ("instructions", "quant", "architecture", "chosen"),
    [
        ({"avx2"}, {}, "bloom", "openvino_graph"),
        ({"avx2"}, {"lm_head_bits": 4}, "bloom", "dequantize"),
        ({"avx2"}, {}, "gemma2", "dequantize"),
        ({"avx2", "avx512_bf16"}, {}, "bloom", "dequantize"),
        ({"asimd"}, {}, "bloom", "dequantize"),
    ],
)
def test_float32_takes_whole_stages_where_there_is_no_bfloat16(
    installed, monkeypatch, instructions, quant, architecture, chosen
):
    installed("openvino_graph", "openvino")
    monkeypatch.setattr(openvino, "_instructions", lambda: frozenset(instructions))
    assert registry.select_kernel(QuantConfig(**quant), ["cpu"], "float32", spec=spec_of(architecture)).kernel == chosen


def spec_of(architecture):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    return describe(sizes | {"model_type": architecture, "intermediate_size": 96, "num_key_value_heads": 4}).spec


def test_whole_stages_that_were_asked_for_must_be_possible():
    def asked(batch_invariant=False, architecture="llama", **quant):
        quant = QuantConfig(kernel="openvino_graph", **quant)
        return registry.select_kernel(quant, ["cpu"], "bfloat16", (), None, spec_of(architecture), batch_invariant)

    assert asked().kernel == "openvino_graph"
    with pytest.raises(UserError, match="its attention does not cap scores"):
        asked(architecture="gemma2")
    with pytest.raises(UserError, match="it has no mixtures of experts"):
        asked(architecture="mixtral")
    with pytest.raises(UserError, match="has no layers of 2 bits"):
        asked(bits=[2, 4])
    with pytest.raises(UserError, match=r"batch_invariant=true cannot be had .* plan with quant.kernel=openvino"):
        asked(batch_invariant=True)


def test_a_kv_cache_of_8_bits_needs_whole_stages(installed, monkeypatch):
    def choose(kernel="auto", kv_bits=8, kinds=("cpu",), **others):
        quant = QuantConfig(kernel=kernel, kv_bits=kv_bits)
        return registry.select_kernel(quant, kinds, "bfloat16", spec=spec_of("llama"), **others).kernel

    installed("openvino_graph", "openvino")
    monkeypatch.setattr(openvino, "_instructions", lambda: frozenset({"avx2", "avx512_bf16"}))
    assert choose() == choose(linears=[("q_proj", 8, 8)]) == "openvino_graph"
    assert choose(kv_bits=16, linears=[("q_proj", 8, 8)]) == "dequantize"
    with pytest.raises(UserError, match=r"kernel=openvino cannot be used: its KV cache has 16 bits, not 8; set"):
        choose("openvino")
    for others in ({"kinds": ("cuda",)}, {"batch_invariant": True}, {"measured": "dequantize"}):
        with pytest.raises(UserError, match=r"quant\.kv_bits=8 needs kernel openvino_graph, which cannot run all of"):
            choose(**others)
    with pytest.raises(UserError, match=r"quant\.kv_bits=4; it must be one of 8, 16"):
        choose(kv_bits=4)


def test_batch_invariance_is_refused_in_one_sentence():
    with pytest.raises(UserError, match=r"plan with quant\.kernel=openvino"):
        registry.check_batch_invariant(KERNELS["openvino_graph"], True)
    registry.check_batch_invariant(KERNELS["openvino"], True)
    registry.check_batch_invariant(registry.find_stage_kernel(None), True)


def test_a_profile_of_whole_stages_gives_single_products_where_those_are_ruled_out(installed):
    installed("openvino_graph", "openvino")
    found = registry.select_kernel(QuantConfig(), ["cpu"], "bfloat16", (), "openvino_graph", spec_of("llama"), True)
    assert found.kernel == "openvino"


def test_a_kernel_that_would_make_small_layers_larger_is_passed_over(installed):
    installed("openvino", "narrow")
    small = SHAPE.linears
    large = [(name, 8 * out, 8 * into) for name, out, into, *_ in small]
    assert registry.select_kernel(QuantConfig(), ["cpu"], "bfloat16", small).kernel == "narrow"
    assert registry.select_kernel(QuantConfig(), ["cpu"], "bfloat16", large).kernel == "openvino"
    found = registry.list_candidates("cpu", "bfloat16", QuantConfig(), small)
    assert found == [KERNELS["narrow"], KERNELS["dequantize"]]


def test_a_profile_s_kernel_goes_before_the_table(installed):
    installed("openvino", "narrow")
    quant = QuantConfig()
    assert registry.select_kernel(quant, ["cpu"], "bfloat16", measured="narrow").kernel == "narrow"
    assert registry.select_kernel(quant, ["cpu"], "bfloat16", measured="dequantize").kernel == "dequantize"
    assert registry.select_kernel(quant, ["cpu"], "float32", measured="openvino").kernel == "dequantize"


def test_a_kernel_that_was_asked_for_need_not_be_installed_here_but_must_be_able(installed):
    installed()
    assert registry.select_kernel(QuantConfig(kernel="openvino"), ["cpu"], "bfloat16").kernel == "openvino"
    with pytest.raises(UserError, match="kernel=openvino cannot be used: it runs on cpu, not on cuda"):
        registry.select_kernel(QuantConfig(kernel="openvino"), ["cuda"], "bfloat16")
    with pytest.raises(UserError, match="computes in bfloat16, not in float32"):
        registry.select_kernel(QuantConfig(kernel="openvino"), ["cpu"], "float32")
    with pytest.raises(UserError, match="'magic'"):
        registry.select_kernel(QuantConfig(kernel="magic"), ["cpu"], "float32")


def effective(name, *size_bits_groups):
    return resolve_kernel(KERNELS[name], *size_bits_groups).name


def test_widths_and_shapes_a_kernel_cannot_take_run_through_hqq():
    assert effective("narrow", 64, 64, 4, GROUPS) == "narrow"
    assert effective("narrow", 64, 64, 8, GROUPS) == "dequantize"
    assert effective("narrow", 72, 64, 4, GROUPS) == "dequantize"
    assert effective("openvino", 72, 64, 1, GROUPS) == "openvino"
    assert effective("openvino", 64, 64, 16, GROUPS) == "dequantize"


def test_per_channel_run_only_where_the_table_says_so():
    rows = Groups(64, 1, (4, 8))
    assert effective("openvino", 64, 512, 8, rows) == effective("openvino", 64, 512, 2, rows) == "openvino"
    assert effective("narrow", 64, 512, 4, rows) == "dequantize"
    assert effective("narrow", 64, 512, 3, rows) == "narrow"


def test_linears_of_one_input_go_together_only_where_all_can():
    linears = [("a.q_proj", 64, 64), ("a.k_proj", 24, 64), ("a.v_proj", 32, 64), ("a.o_proj", 64, 64)]
    linears += [("m.gate_proj", 96, 64), ("m.up_proj", 96, 64), ("m.down_proj", 64, 96)]

    def names(kernel, bits):
        return [[entry[0] for entry in group] for group in group_linears(KERNELS[kernel], linears, bits, GROUPS)]

    apart = [[entry[0]] for entry in linears]
    qkv, mlp = ["a.q_proj", "a.k_proj", "a.v_proj"], ["m.gate_proj", "m.up_proj"]
    assert names("openvino", 4) == [qkv, ["a.o_proj"], mlp, ["m.down_proj"]]
    assert names("narrow", 4) == [["a.q_proj", "a.v_proj"], ["a.k_proj"], ["a.o_proj"], mlp, ["m.down_proj"]]
    gate_and_up = [[name] for name in mlp]
    assert names("openvino_graph", 4) == [qkv, ["a.o_proj"], *gate_and_up, ["m.down_proj"]]
    assert names("openvino_graph", 16) == names("openvino_graph", 4)
    assert names("openvino", 16) == names("dequantize", 4) == apart


def test_bytes_by_hand():
    """64 x 128 weights in groups of 64: 128 groups."""
    assert KERNELS["openvino"].read_bytes(64, 128, 8, GROUPS, 2) == 64 * 128 + 128 * 9
    assert KERNELS["openvino"].read_bytes(64, 128, 2, GROUPS, 2) == 64 * 128 // 4 + 128 * 9
    assert KERNELS["openvino"].read_bytes(64, 128, 8, WHOLE, 2) == 64 * 128 + 128 * 5
    assert KERNELS["openvino"].read_bytes(64, 128, 2, WHOLE, 2) == 64 * 128 // 4 + 128 * 5
    assert KERNELS["narrow"].weight_bytes(64, 128, 3, GROUPS, 2) == 64 * 128 // 2 + 128 * 4


def test_bytes_of_per_channel_by_hand():
    """A layer at 8 bits against groups of 64: a scale, a zero and a correction a row instead of one for each group."""
    rows, wide = sum(out for _, out, *_ in SHAPE.linears), SHAPE.linear_weights // 64
    for kernel, each in (("openvino", 9), ("dequantize", 2 * 2)):
        apart, whole = (MemoryModel(SHAPE, groups, 2, KERNELS[kernel]) for groups in (GROUPS, ROWS))
        assert apart.layer_bytes(8) - whole.layer_bytes(8) == each * (wide - rows)
        assert apart.layer_bytes(4) == whole.layer_bytes(4)
    read = layer_read_bytes(SHAPE, 8, KERNELS["openvino"], ROWS, 2)
    assert read == SHAPE.linear_weights + 9 * rows


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("groups", [GROUPS, ROWS])
def test_models_of_cost_agree_on_a_kernel(bits, groups):
    for kernel in ("openvino_graph", "openvino", "narrow", "dequantize"):
        if kernel == "openvino_graph" and bits == 2:
            continue
        layer = MemoryModel(SHAPE, groups, 2, KERNELS[kernel]).layer_bytes(bits)
        assert layer == layer_bytes(KERNELS[kernel], SHAPE.linears, bits, groups, 2) + 2 * SHAPE.layer_other_parameters
        plain = kernel == "dequantize" or (kernel == "narrow" and bits == 8)
        read = layer_read_bytes(SHAPE, bits, KERNELS[kernel], groups, 2)
        assert (read == 2 * SHAPE.linear_weights) == plain
        assert plain or read <= layer


def test_workspace_of_a_kernel():
    def of(kernel, groups=GROUPS):
        return MemoryModel(SHAPE, groups, 2, KERNELS[kernel]).workspace_parts(4, 8, 0, True)["dequantized"]

    assert of("fused") == 0
    assert of("narrow") == of("dequantize") == 3 * 256 * 512 * 2  # its 8 bits run through HQQ's own forward
    assert of("openvino") == of("openvino", ROWS) == openvino.PRODUCT_ROWS * (512 + 2 * 512) * 4


def test_memory_of_whole_stages():
    """The cache comes in blocks; buffers are the same for any pass, quantized or not."""
    of_graph, by_layer = (MemoryModel(SHAPE, GROUPS, 2, KERNELS[kernel]) for kernel in ("openvino_graph", "dequantize"))
    assert of_graph.kv_bytes_per_sequence_layer(1) == 32 * by_layer.kv_bytes_per_sequence_layer(1)
    assert of_graph.kv_bytes_per_sequence_layer(64) == by_layer.kv_bytes_per_sequence_layer(64)
    small, large = (of_graph.workspace_parts(rows, tokens, 0, False) for rows, tokens in ((1, 1), (8, 500)))
    assert small["dequantized"] == large["dequantized"] > 12e6
    assert large["activations"] == 8 * 500 * (2 * 256 + 4 * 2 * 64) * 2
    assert of_graph.layer_bytes(16) - by_layer.layer_bytes(16) == 1_400_000


@pytest.mark.parametrize(("name", "instead"), [("torch_int4", "openvino"), ("gemlite", "humming")])
def test_a_kernel_that_is_gone_names_what_runs_instead(name, instead):
    said = f"kernel '{name}' is gone; use quant.kernel={instead} "
    with pytest.raises(UserError, match=said):
        registry.select_kernel(QuantConfig(kernel=name), ["cpu"], "bfloat16")
    with pytest.raises(UserError, match=said):
        registry.select_kernel(QuantConfig(), ["cpu"], "bfloat16", measured=name)
    with pytest.raises(UserError, match=said):
        registry.find_stage_kernel(name)
