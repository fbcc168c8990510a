"""Private and undocumented parts of OpenVINO, and the properties of its CPU plugin."""

from types import SimpleNamespace

import numpy
import pytest
import torch

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")

LIBRARY = "openvino"
SEEN = ("2026.2.0", "2026.4.1")
NO_WINDOW = SimpleNamespace(window=None)
INPUTS = 28  # of the attention over a paged cache


def attention_inputs(alibi=False):
    """Inputs of the operation as our graph gives them, for 2 heads of 16."""
    from openvino import opset13

    from ds_llmpq.models.spec import AttentionSpec
    from ds_llmpq.quant.kernels.openvino_graph.decoder_layer import LayerNodes, Rows, cache_parameter

    layer = LayerNodes.__new__(LayerNodes)
    layer.spec, layer.layer = AttentionSpec(2, 2, 16, 0.25, alibi=alibi), SimpleNamespace(self_attn=NO_WINDOW)
    states = [opset13.parameter([-1, 32], openvino.Type.f32) for _ in range(3)]
    tables = [opset13.parameter([-1], openvino.Type.i32) for _ in range(4)]
    rows = Rows({}, *tables, opset13.parameter([], openvino.Type.i32))
    caches = [cache_parameter(2, 16, openvino.Type.bf16) for _ in range(2)]
    return layer._attention_inputs(*states, rows, *caches)


@pytest.mark.parametrize("alibi", [False, True])
def test_attention_over_a_paged_cache(alibi):
    """`_PagedAttentionExtension(inputs)`, in quant/kernels/openvino_graph/decoder_layer.py: exactly 28 inputs by place,
    whose types and ranks it checks; one output [tokens, heads x size]."""
    from openvino.op import _PagedAttentionExtension

    inputs = attention_inputs(alibi)
    assert len(inputs) == INPUTS
    operation = _PagedAttentionExtension(inputs)
    assert operation.get_input_size() == INPUTS
    assert operation.output(0).get_partial_shape().rank.get_length() == 2
    with pytest.raises(RuntimeError):
        _PagedAttentionExtension(inputs[:-1])


def test_heads_told_by_runtime_information():
    """`get_rt_info()`, in quant/kernels/openvino_graph/decoder_layer.py: takes `num_k_heads`, `k_head_size` and the
    like, and keeps them."""
    from openvino.op import _PagedAttentionExtension

    known = _PagedAttentionExtension(attention_inputs()).get_rt_info()
    known["num_k_heads"] = known["num_v_heads"] = 2
    known["k_head_size"] = known["v_head_size"] = 16
    assert [known[name].value for name in ("num_k_heads", "num_v_heads", "k_head_size", "v_head_size")] == [
        2,
        2,
        16,
        16,
    ]


def test_properties_of_the_plugin():
    """`DYNAMIC_QUANTIZATION_GROUP_SIZE`, in quant/kernels/openvino_graph/stage_graph.py: with the other properties we
    compile with, known to the CPU plugin."""
    known = openvino.Core().get_property("CPU", "SUPPORTED_PROPERTIES")
    wanted = {
        "DYNAMIC_QUANTIZATION_GROUP_SIZE", "INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "INFERENCE_NUM_THREADS",
        "NUM_STREAMS", "ENABLE_CPU_PINNING",
    }  # fmt: skip
    assert wanted - set(known) == set()


def test_constants_read_our_memory():
    """`openvino.op.Constant(tensor, shared_memory=True)`, in quant/kernels/openvino_graph/constants.py: reads the array
    where it lies, in 2, 4 and 8 bits, the first code of a byte in its lowest bits."""
    from ds_llmpq.quant.kernels.openvino_graph.constants import constant

    data = numpy.arange(8, dtype=numpy.uint8)
    whole = constant(data, [8], openvino.Type.u8)
    data[:] = 7
    assert whole.get_data().tolist() == [7] * 8
    codes = numpy.array([0x21, 0x43], numpy.uint8)
    model = openvino.Model([openvino.opset13.convert(constant(codes, [4], openvino.Type.u4), "f32")], [])
    found = openvino.Core().compile_model(model, "CPU").create_infer_request().infer()
    assert next(iter(found.values())).tolist() == [1, 2, 3, 4]


def test_tensors_share_our_memory():
    """`openvino.Tensor(array, shape, type)`, in quant/kernels/openvino_graph/tensors.py: with
    `infer(share_outputs=True)`, inputs are read from and outputs written to torch's own memory, bfloat16 seen as 16-bit
    integers."""
    from openvino import opset13

    from ds_llmpq.quant.kernels.openvino_graph.tensors import share

    source, target = torch.ones(2, 3).bfloat16(), torch.zeros(2, 3).bfloat16()
    inputs = opset13.parameter([-1, 3], openvino.Type.bf16)
    model = openvino.Model([opset13.result(opset13.add(inputs, inputs))], [inputs])
    request = openvino.Core().compile_model(model, "CPU").create_infer_request()
    request.set_input_tensor(share(source))
    request.set_output_tensor(share(target))
    request.infer(share_outputs=True)
    assert target.tolist() == [[2.0] * 3] * 2
    source.fill_(3.0)
    request.infer(share_outputs=True)
    assert target.tolist() == [[6.0] * 3] * 2
