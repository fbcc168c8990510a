"""A decoder layer of the Llama family (`models.families.llama`) as nodes of an OpenVINO graph.

Tokens of all rows lie one after another, [tokens, hidden]; attention finds each row's keys and values in a cache of
blocks of `BLOCK` positions and adds the new ones to it, so rows may be of any lengths and at any positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy
import openvino
from openvino import Node, opset13
from openvino.op import _PagedAttentionExtension

from ds_llmpq.errors import UserError
from ds_llmpq.models.block import Block, Norm
from ds_llmpq.quant.kernels.openvino_graph.constants import Constants, product, wide
from ds_llmpq.quant.kernels.registry import CACHE_BLOCK


def _silu(inputs: Node) -> Node:
    kind = inputs.get_element_type()
    return opset13.swish(inputs, opset13.convert(_scalar(1.0), kind) if kind != openvino.Type.f32 else None)


def _scalar(value: float) -> Node:
    return opset13.constant(numpy.float32(value))


# by transformers' names
_ACTIVATIONS: dict[str, Callable[[Node], Node]] = {
    "silu": _silu,
    "gelu": lambda inputs: opset13.gelu(inputs, "erf"),
    "gelu_new": lambda inputs: opset13.gelu(inputs, "tanh"),
    "gelu_pytorch_tanh": lambda inputs: opset13.gelu(inputs, "tanh"),
    "relu": opset13.relu,
}


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a pass stand, for all layers alike: rotary cosines and sines [tokens, 1, 1, head size], and
    the attention's tables (a row's tokens in the cache, its span of new tokens, its blocks)."""

    cos: Node
    sin: Node
    past_lens: Node
    subsequence_begins: Node
    block_indices: Node
    block_indices_begins: Node
    max_context_len: Node


class LayerNodes:
    """Builds one layer's nodes from its block and its linears' weights.

    weights: by the linears' dotted names; those of one input as one, stacked. Norms and biases are the block's.
    """

    def __init__(self, layer: Block, weights: Mapping[tuple[str, ...], Constants]):
        attention = layer.spec.attention
        self.layer, self.weights, self.window = layer, weights, layer.self_attn.window
        self.head_dim, self.scaling = attention.head_dim, attention.scale
        self.heads, self.kv_heads = attention.heads, attention.kv_heads
        name = layer.mlp.spec.activation
        if name not in _ACTIVATIONS:
            raise UserError(
                f"quant.kernel=openvino_graph does not know the activation {name!r}; use quant.kernel=openvino."
            )
        self.activation = _ACTIVATIONS[name]

    def outputs(self, hidden: Node, rows: Rows, key_cache: Node, value_cache: Node) -> Node:
        """Hidden states [tokens, hidden] behind the layer."""
        attended = self._attention(_norm(hidden, self.layer.attention_norm), rows, key_cache, value_cache)
        hidden = opset13.add(hidden, wide(self._product(attended, "self_attn.o_proj")))
        normed = _norm(hidden, self.layer.mlp_norm)
        # two products, not one: activation and multiplication become part of them
        gate, up = self._product(normed, "mlp.gate_proj"), self._product(normed, "mlp.up_proj")
        gated = opset13.multiply(self.activation(gate), up)
        return opset13.add(hidden, wide(self._product(gated, "mlp.down_proj")))

    def _attention(self, normed: Node, rows: Rows, key_cache: Node, value_cache: Node) -> Node:
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        sizes = [self.layer.get_submodule(name).out_features for name in names]
        together = wide(self._product(normed, *names))
        query, key, value = opset13.variadic_split(together, opset13.constant(1), opset13.constant(sizes)).outputs()
        query = self._placed(query, self.heads, rows, getattr(self.layer.self_attn, "q_norm", None))
        key = self._placed(key, self.kv_heads, rows, getattr(self.layer.self_attn, "k_norm", None))
        attention = _PagedAttentionExtension(self._attention_inputs(query, key, value, rows, key_cache, value_cache))
        known = attention.get_rt_info()
        known["num_k_heads"] = known["num_v_heads"] = self.kv_heads
        known["k_head_size"] = known["v_head_size"] = self.head_dim
        size = opset13.constant(numpy.array([0, self.heads * self.head_dim]))
        return opset13.reshape(attention.output(0), size, True)

    def _placed(self, states: Node, heads: int, rows: Rows, norm: Norm | None) -> Node:
        """Queries or keys, each head normed where the family does so, and rotated to their positions: written in the
        form that OpenVINO knows as one operation."""
        split = opset13.reshape(states, opset13.constant(numpy.array([0, heads, 1, self.head_dim])), True)
        if norm is not None:
            split = _norm(split, norm)
        middle, end = self.head_dim // 2, self.head_dim
        first, second = (_part(split, start, stop) for start, stop in ((0, middle), (middle, end)))
        turned = opset13.concat([opset13.multiply(second, _scalar(-1.0)), first], -1)
        rotated = opset13.add(opset13.multiply(split, rows.cos), opset13.multiply(turned, rows.sin))
        return opset13.reshape(rotated, opset13.constant(numpy.array([0, heads * self.head_dim])), True)

    def _attention_inputs(
        self, query: Node, key: Node, value: Node, rows: Rows, key_cache: Node, value_cache: Node
    ) -> list[openvino.Output]:
        """In the operation's order. What it could do besides (ALiBi, scores, eviction, sinks) is left empty."""
        tables = (rows.past_lens, rows.subsequence_begins, rows.block_indices, rows.block_indices_begins)
        nodes = [
            query, key, value, key_cache, value_cache, *tables,
            _scalar(self.scaling), _count(self.window or 0), _none(numpy.float32), rows.max_context_len,
            _none(numpy.int32), _none(numpy.int32), _none(numpy.int32), _none(numpy.float32), _none(numpy.float32),
            _count(0), _count(0), _none(numpy.float32, 4), _count(0), _none(numpy.int32), _none(numpy.int32),
            _none(numpy.int32), _none(numpy.int32), _none(numpy.uint8), _none(numpy.int32),
        ]  # fmt: skip
        return [node if isinstance(node, openvino.Output) else node.output(0) for node in nodes]

    def _product(self, inputs: Node, *names: str) -> Node:
        """Outputs of linears of one input, side by side, in whatever type the product has."""
        outputs = product(inputs, self.weights[names])
        biases = [self.layer.get_submodule(name).bias for name in names]
        if biases[0] is None:
            return outputs
        together = numpy.concatenate([bias.detach().float().numpy() for bias in biases])
        return opset13.add(wide(outputs), opset13.constant(together[None]))


def cache_parameter(kv_heads: int, head_dim: int) -> Node:
    """Keys or values of a layer: [blocks, key/value heads, positions of a block, head size]."""
    return opset13.parameter([-1, kv_heads, CACHE_BLOCK, head_dim], openvino.Type.bf16)


def _norm(states: Node, norm: Norm) -> Node:
    """Over the last dimension, by root mean square."""
    squares = opset13.reduce_mean(opset13.power(states, _scalar(2.0)), opset13.constant(numpy.array([-1])), True)
    root = opset13.sqrt(opset13.add(squares, _scalar(norm.spec.eps)))
    scaled = opset13.multiply(states, opset13.divide(_scalar(1.0), root))
    return opset13.multiply(scaled, opset13.constant(norm.weight.detach().float().numpy()[None]))


def _part(states: Node, start: int, stop: int) -> Node:
    ends = (opset13.constant(numpy.array([value])) for value in (start, stop, 1, 3))
    return opset13.slice(states, *ends)


def _count(value: int) -> Node:
    return opset13.constant(numpy.int32(value))


def _none(kind: type, rank: int = 1) -> Node:
    return opset13.constant(numpy.zeros((0,) * rank, kind))
