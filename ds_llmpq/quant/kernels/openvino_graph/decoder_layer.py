"""Builds a decoder layer (`models.block`) as nodes of an OpenVINO graph from its `DecoderSpec`.

Tokens of all rows are concatenated, [tokens, hidden]. Attention finds each row's keys and values in a cache of blocks
of `CACHE_BLOCK` positions and adds the new ones, so rows may have any lengths and positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy
import openvino
from openvino import Node, opset13
from openvino.op import _PagedAttentionExtension

from ds_llmpq.models.block import Attention, Block, Norm
from ds_llmpq.models.ends import compute_alibi_slopes
from ds_llmpq.quant.kernels.openvino import CACHE_BLOCK
from ds_llmpq.quant.kernels.openvino_graph.constants import Constants, product, widen


def _scalar(value: float) -> Node:
    return opset13.constant(numpy.float32(value))


def _like(value: float, inputs: Node) -> Node:
    """A constant of the type of `inputs`."""
    kind = inputs.get_element_type()
    return _scalar(value) if kind == openvino.Type.f32 else opset13.convert(_scalar(value), kind)


def _silu(inputs: Node) -> Node:
    kind = inputs.get_element_type()
    return opset13.swish(inputs, None if kind == openvino.Type.f32 else _like(1.0, inputs))


def _gelu(inputs: Node) -> Node:
    return opset13.gelu(inputs, "erf")


def _tanh_gelu(inputs: Node) -> Node:
    return opset13.gelu(inputs, "tanh")


def _squared_relu(inputs: Node) -> Node:
    positive = opset13.relu(inputs)
    return opset13.multiply(positive, positive)


# all of `models.spec.ACTIVATIONS`
_ACTIVATIONS: dict[str, Callable[[Node], Node]] = {
    "silu": _silu,
    "swish": _silu,
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": lambda inputs: opset13.swish(inputs, _like(1.702, inputs)),
    "relu": opset13.relu,
    "relu2": _squared_relu,
    "relu6": lambda inputs: opset13.clamp(inputs, 0.0, 6.0),
    "mish": opset13.mish,
    "tanh": opset13.tanh,
    "sigmoid": opset13.sigmoid,
}


@dataclass(frozen=True)
class Rows:
    """Positions of the tokens in a pass, for all layers: cosines and sines [tokens, 1, 1, rotated features] by the
    names of `DecoderSpec.rotary`, and attention's tables (cached tokens of each row, its new tokens, its blocks)."""

    rotary: Mapping[str, tuple[Node, Node]]
    past_lens: Node
    subsequence_begins: Node
    block_indices: Node
    block_indices_begins: Node
    max_context_len: Node


class LayerNodes:
    """Builds one layer's nodes. weights: by the linears' dotted names, stacked for linears of one input. Norms and
    biases come from the block."""

    def __init__(self, layer: Block, weights: Mapping[tuple[str, ...], Constants]):
        self.layer, self.weights, self.spec = layer, weights, layer.spec.attention

    def outputs(self, hidden: Node, rows: Rows, key_cache: Node, value_cache: Node) -> Node:
        """Hidden states [tokens, hidden] after the layer."""
        layer = self.layer

        def attend(normed: Node) -> Node:
            return self._product(self._attention(normed, rows, key_cache, value_cache), "self_attn.o_proj")

        hidden = self._half(hidden, attend, layer.attention_norm, layer.attention_out_norm)
        return self._half(hidden, self._mlp, layer.mlp_norm, layer.mlp_out_norm)

    def _half(self, hidden: Node, work: Callable[[Node], Node], norm: Norm, out_norm: Norm | None) -> Node:
        """As attention and MLP in `Block`."""
        if self.layer.spec.norms == "after":
            return build_norm(opset13.add(hidden, widen(work(hidden))), norm)
        normed = build_norm(hidden, norm)
        outputs = widen(work(normed))
        if out_norm is not None:
            outputs = build_norm(outputs, out_norm)
        return opset13.add(normed if self.layer.spec.residual_from_norm else hidden, outputs)

    def _mlp(self, normed: Node) -> Node:
        spec = self.layer.mlp.spec
        activate = _ACTIVATIONS[spec.activation]
        if not spec.gated:
            return self._product(activate(self._product(normed, "mlp.up_proj")), "mlp.down_proj")
        if spec.stacked:
            gate, up = _split(self._product(normed, "mlp.gate_up_proj"), [spec.intermediate] * 2)
        else:
            # two products, so that OpenVINO fuses activation and multiplication into them
            gate, up = self._product(normed, "mlp.gate_proj"), self._product(normed, "mlp.up_proj")
        return self._product(opset13.multiply(activate(gate), up), "mlp.down_proj")

    def _attention(self, normed: Node, rows: Rows, key_cache: Node, value_cache: Node) -> Node:
        spec, attention = self.spec, self.layer.self_attn
        query, key, value = self._heads(normed)
        query = self._place(query, spec.heads, rows, attention, "q_norm")
        key = self._place(key, spec.kv_heads, rows, attention, "k_norm")
        attention = _PagedAttentionExtension(self._attention_inputs(query, key, value, rows, key_cache, value_cache))
        known = attention.get_rt_info()
        known["num_k_heads"] = known["num_v_heads"] = spec.kv_heads
        known["k_head_size"] = known["v_head_size"] = spec.head_dim
        return _reshape(attention.output(0), [0, spec.heads * spec.head_dim])

    def _heads(self, normed: Node) -> list[openvino.Output | Node]:
        """Queries, keys, values: [tokens, heads x features] each."""
        spec, size = self.spec, self.spec.head_dim
        if spec.qkv == "separate":
            together = self._product(normed, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        else:
            together = self._product(normed, "self_attn.qkv_proj")
        if spec.qkv == "interleaved":
            by_head = _reshape(widen(together), [0, spec.heads, 3, size])
            parts = opset13.split(by_head, opset13.constant(2), 3).outputs()
            return [_reshape(part, [0, spec.heads * size]) for part in parts]
        return _split(widen(together), [spec.heads * size, spec.kv_heads * size, spec.kv_heads * size])

    def _place(self, states: Node, heads: int, rows: Rows, attention: Attention, norm: str) -> Node:
        """Queries or keys, with norms if the family has them, and rotated, in a form that OpenVINO recognizes as one
        operation."""
        spec, size = self.spec, self.spec.head_dim
        if spec.qk_norm is None and attention.rotary is None:
            return states
        split = _reshape(states, [0, heads, 1, size])
        if spec.qk_norm is not None:
            split = build_norm(split, getattr(attention, norm))
        if attention.rotary is not None:
            split = _rotate(split, size, *rows.rotary[attention.rotary])
        return _reshape(split, [0, heads * size])

    def _attention_inputs(
        self, query: Node, key: Node, value: Node, rows: Rows, key_cache: Node, value_cache: Node
    ) -> list[openvino.Output]:
        """Inputs in the operation's order. Unused features (scores, eviction, sinks) get empty tensors."""
        tables = (rows.past_lens, rows.subsequence_begins, rows.block_indices, rows.block_indices_begins)
        slopes = _none(numpy.float32)
        if self.spec.alibi:
            slopes = opset13.constant(numpy.array(compute_alibi_slopes(self.spec.heads), numpy.float32))
        nodes = [
            query, key, value, key_cache, value_cache, *tables,
            _scalar(self.spec.scale), _count(self.layer.self_attn.window or 0), slopes, rows.max_context_len,
            _none(numpy.int32), _none(numpy.int32), _none(numpy.int32), _none(numpy.float32), _none(numpy.float32),
            _count(0), _count(0), _none(numpy.float32, 4), _count(0), _none(numpy.int32), _none(numpy.int32),
            _none(numpy.int32), _none(numpy.int32), _none(numpy.uint8), _none(numpy.int32),
        ]  # fmt: skip
        return [node if isinstance(node, openvino.Output) else node.output(0) for node in nodes]

    def _product(self, inputs: Node, *names: str) -> Node:
        """Outputs of linears of one input, side by side, in the type of the product."""
        outputs = product(inputs, self.weights[names])
        biases = [self.layer.get_submodule(name).bias for name in names]
        if biases[0] is None:
            return outputs
        together = numpy.concatenate([bias.detach().float().numpy() for bias in biases])
        return opset13.add(widen(outputs), opset13.constant(together[None]))


def cache_parameter(kv_heads: int, size: int, kind: openvino.Type) -> Node:
    """Keys or values of a layer: [blocks, key/value heads, positions of a block, elements of a vector]."""
    return opset13.parameter([-1, kv_heads, CACHE_BLOCK, size], kind)


def build_norm(states: Node, norm: Norm) -> Node:
    """A norm over the last dimension."""
    last, spec = opset13.constant(numpy.array([-1])), norm.spec
    if spec.kind == "layer":
        scaled = opset13.mvn(states, last, True, spec.eps, "INSIDE_SQRT")
    else:
        squares = opset13.reduce_mean(opset13.power(states, _scalar(2.0)), last, True)
        root = opset13.sqrt(opset13.add(squares, _scalar(spec.eps)))
        scaled = opset13.multiply(states, opset13.divide(_scalar(1.0), root))
    if norm.weight is not None:
        weight = norm.weight.detach().float().numpy()[None]
        scaled = opset13.multiply(scaled, opset13.constant(weight + 1 if spec.plus_one else weight))
    if norm.bias is not None:
        scaled = opset13.add(scaled, opset13.constant(norm.bias.detach().float().numpy()[None]))
    return scaled


def _rotate(states: Node, size: int, cos: Node, sin: Node) -> Node:
    """`block.rotate` for [tokens, heads, 1, size]; here sines have no signs."""
    features = int(cos.get_output_partial_shape(0)[3].get_length())
    turned, rest = states, None
    if features < size:
        turned, rest = _part(states, 0, features), _part(states, features, size)
    first, second = _part(turned, 0, features // 2), _part(turned, features // 2, features)
    other = opset13.concat([opset13.multiply(second, _scalar(-1.0)), first], -1)
    rotated = opset13.add(opset13.multiply(turned, cos), opset13.multiply(other, sin))
    return rotated if rest is None else opset13.concat([rotated, rest], -1)


def _split(states: Node, sizes: list[int]) -> list[openvino.Output]:
    """Splits the second of two dimensions."""
    return opset13.variadic_split(states, opset13.constant(1), opset13.constant(sizes)).outputs()


def _reshape(states: Node, shape: list[int]) -> Node:
    return opset13.reshape(states, opset13.constant(numpy.array(shape)), True)


def _part(states: Node, start: int, stop: int) -> Node:
    ends = (opset13.constant(numpy.array([value])) for value in (start, stop, 1, 3))
    return opset13.slice(states, *ends)


def _count(value: int) -> Node:
    return opset13.constant(numpy.int32(value))


def _none(kind: type, rank: int = 1) -> Node:
    return opset13.constant(numpy.zeros((0,) * rank, kind))
