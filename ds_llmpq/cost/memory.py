"""Bytes that a pipeline stage holds, part by part. The loader is held against the same numbers."""

from __future__ import annotations

from dataclasses import dataclass

from ds_llmpq.cost.arithmetic import FLOAT32_BYTES, kv_bytes, score_entries
from ds_llmpq.cost.products import layer_kernel
from ds_llmpq.integers import round_up
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.quant.kernels.base import Kernel
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.quant.kernels.linears import (
    group_linears,
    layer_bytes,
    list_lm_head_products,
    lm_head_bytes,
    stack_features,
)
from ds_llmpq.quant.onednn_kernels import KEPT_BYTES
from ds_llmpq.quant.packing import PACKED_BITS, UNQUANTIZED_BITS, Groups

IN_FLIGHT_MESSAGES = 2  # hidden-state buffers in each direction: one in use, one posted ahead


@dataclass(frozen=True)
class MemoryModel:
    """Memory of one model under one quantization setting; every method returns bytes.

    kernel: what runs quantized linears. It decides how many bytes a width takes, and what its products need for
    themselves. lm_head_bits: width of lm_head; kv_bits: of keys and values in the cache. onednn: its products are
    oneDNN's, which keeps kernels of them: in bfloat16 on a CPU, where a stage is no graph.
    """

    shape: ModelShape
    groups: Groups
    dtype_bytes: int
    kernel: Kernel = DEQUANTIZE
    lm_head_bits: int = UNQUANTIZED_BITS
    kv_bits: int = UNQUANTIZED_BITS
    onednn: bool = False

    def layer_bytes(self, bits: int) -> int:
        """One decoder layer: weights as the kernel holds them; norms and biases in the compute dtype."""
        linears = layer_bytes(self.kernel, self.shape.linears, bits, self.groups, self.dtype_bytes)
        return linears + self.shape.layer_other_parameters * self.dtype_bytes

    def kv_bytes_per_sequence_layer(self, capacity_tokens: int) -> int:
        """Static cache of one layer for one sequence of prompt + generated tokens, in the kernel's whole blocks."""
        positions = round_up(capacity_tokens, self.kernel.cache_block)
        vector = self.kernel.kv_vector_bytes(self.shape.head_dim, self.kv_bits, self.dtype_bytes)
        return 2 * self.shape.kv_heads * positions * vector

    def embed_bytes(self) -> int:
        return self.shape.embed_parameters * self.dtype_bytes

    def head_bytes(self) -> int:
        """With lm_head, also when it is tied: the last stage has its own copy unless it is the first one too."""
        others = self.shape.head_parameters - self.shape.lm_head.weights
        return self._matrix_bytes() + self._head_graph_bytes() + others * self.dtype_bytes

    @property
    def shares_embedding(self) -> bool:
        """Whether a stage with both ends holds one matrix for embedding and head."""
        return self.shape.tied_embeddings and self.lm_head_bits == UNQUANTIZED_BITS

    @property
    def tied_bytes(self) -> int:
        """Of the head, what such a stage does not hold a second time, or not at all; the norm before lm_head is its
        own."""
        return self._matrix_bytes() + self._head_graph_bytes() if self.shares_embedding else 0

    def workspace_parts(self, sequences: int, new_tokens: int, past_tokens: int, quantized: bool) -> dict[str, int]:
        """What one micro-batch needs beside weights and cache: activations, dequantized weight, messages, logits.

        activations: the larger of the attention's and the MLP's set of tensors alive at once in one layer.
        dequantized: HQQ's temporaries for the largest linear, or a kernel's own buffers, if any layer is quantized;
        those of a stage's graph in any case.
        communication: hidden states received ahead and being sent.
        logits: of the last position, with the float32 copies that sampling makes, and what a quantized lm_head
        needs for itself; alive when activations are not.
        kernels: those that oneDNN keeps, if there are as many as it has room for.
        """
        rows = sequences * new_tokens
        if self.kernel.whole_stage:
            return self._graph_parts(rows, sequences)
        attention = rows * self._attention_width() * self.dtype_bytes
        attention += self._score_bytes(sequences, new_tokens, past_tokens)
        mlp = rows * self._mlp_width() * self.dtype_bytes
        message = rows * self.shape.hidden * self.dtype_bytes
        return {
            "activations": max(attention, mlp),
            "dequantized": self._dequantized_bytes() if quantized else 0,
            "communication": 2 * IN_FLIGHT_MESSAGES * message,
            "logits": self._logit_bytes(sequences),
            "kernels": KEPT_BYTES if self.onednn else 0,
        }

    def _graph_parts(self, rows: int, sequences: int) -> dict[str, int]:
        """Where a stage's layers are one graph: its buffers are bounded, and outside of it are hidden states before and
        behind it, and the rotary tables."""
        shape = self.shape
        width = 2 * shape.hidden + 4 * self._position_width()
        return {
            "activations": rows * width * self.dtype_bytes,
            "dequantized": self.kernel.stage_workspace_bytes(shape, self.groups),
            "communication": 2 * IN_FLIGHT_MESSAGES * rows * shape.hidden * self.dtype_bytes,
            "logits": self._logit_bytes(sequences),
        }

    @property
    def _head_is_graph(self) -> bool:
        return self.kernel.takes_head(self.shape.spec, self.lm_head_bits)

    def _head_graph_bytes(self) -> int:
        return self.kernel.head_buffer_bytes(self.shape.vocab, self.lm_head_bits) if self._head_is_graph else 0

    def _logit_bytes(self, sequences: int) -> int:
        if self._head_is_graph:  # its float32 logits, of which it has the first rows, and a copy
            return sequences * self.shape.vocab * 2 * FLOAT32_BYTES
        logits = sequences * self.shape.vocab * (self.dtype_bytes + 2 * FLOAT32_BYTES)
        return logits + self._head_buffer_bytes()

    def _head_buffer_bytes(self) -> int:
        if self.lm_head_bits == UNQUANTIZED_BITS:
            return 0
        _, *size, _ = self.shape.lm_head
        kernel, products = list_lm_head_products(self.kernel, *size, self.lm_head_bits, self.groups)
        return kernel.workspace_bytes(products, self.dtype_bytes)

    def workspace_bytes(self, sequences: int, new_tokens: int, past_tokens: int, quantized: bool) -> int:
        parts = self.workspace_parts(sequences, new_tokens, past_tokens, quantized)
        if self.kernel.whole_stage:  # graphs keep their buffers, and that of lm_head its logits
            return sum(parts.values())
        at_once = max(parts["activations"] + parts["dequantized"], parts["logits"])
        return at_once + parts["communication"] + parts["kernels"]

    def prefix_bytes(self, sequences: int, new_tokens: int, shared_tokens: int, seen: int) -> int:
        """What a pass that attends to `seen` tokens a row needs beside `workspace_bytes` where rows share a prefix: in
        prefill keys and values that are joined for it; in decode scores in 32 bits, and weights."""
        if not shared_tokens or self.kernel.whole_stage:
            return 0
        if new_tokens > 1:
            return kv_bytes(self.shape, sequences, seen, self.dtype_bytes)
        return score_entries(self.shape, sequences, 1, seen - 1) * 2 * (self.dtype_bytes + FLOAT32_BYTES)

    def gathered_bytes(self, sequences: int, seen: int) -> int:
        """What a decode pass over shared blocks copies of the cache, a layer at a time, where attention does not read
        blocks in place."""
        return 0 if self.kernel.whole_stage else kv_bytes(self.shape, sequences, seen, self.dtype_bytes)

    def captured_pool_bytes(self, sequences: int, past_tokens: int, quantized: bool) -> int:
        """What captured decode passes of so many sequences work in: memory of the graphs' own, which nothing else
        may use between passes. All graphs share it, and the logits that they leave beside it."""
        parts = self.workspace_parts(sequences, 1, past_tokens, quantized)
        logits = sequences * self.shape.vocab * self.dtype_bytes
        return max(parts["activations"] + parts["dequantized"], logits) + logits

    def _matrix_bytes(self) -> int:
        """Of lm_head, which is the embedding where they are one."""
        _, *size, _ = self.shape.lm_head
        if self.lm_head_bits == UNQUANTIZED_BITS:
            return self.shape.lm_head.weights * self.dtype_bytes
        return lm_head_bytes(self.kernel, *size, self.lm_head_bits, self.groups, self.dtype_bytes)

    def _attention_width(self) -> int:
        """Elements per row alive in attention: residual and normed input, q/k/v twice (rotated or copied), outcome."""
        shape = self.shape
        qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        return 2 * shape.hidden + 2 * qkv + shape.heads * shape.head_dim + self._position_width()

    def _mlp_width(self) -> int:
        """Elements per row alive in the MLP: residual, normed input, outcome, copies of the intermediate, and what
        attention gave.

        Gated: gate, up and their product. Plain: before and after the activation. An expert has a copy of its tokens'
        inputs and outputs, these also weighted in 32 bits.
        """
        shape = self.shape
        copies = 3 if shape.gated_mlp else 2
        states = 7 if shape.has_experts else 3
        attended = shape.heads * shape.head_dim
        return states * shape.hidden + copies * shape.intermediate + attended + self._position_width()

    def _position_width(self) -> int:
        """Rotary cosines and sines, computed once a micro-batch."""
        return sum(2 * rotary.features for _, rotary in self.shape.spec.rotary)

    def _score_bytes(self, sequences: int, new_tokens: int, past_tokens: int) -> int:
        """The mask, or ALiBi's bias for each head, which rows of a prefill share, beside its slopes times positions;
        capped scores are also held twice, with softmax and its input in float32, and copies of k, v."""
        seen, attention = past_tokens + new_tokens, self.shape.spec.attention
        mask = sequences * new_tokens * seen * self.dtype_bytes
        if attention.alibi:
            rows = sequences if new_tokens == 1 else 1
            mask += self.shape.heads * (rows * new_tokens + 2) * seen * self.dtype_bytes
        if attention.soft_cap is None:
            return mask
        scores = score_entries(self.shape, sequences, new_tokens, past_tokens)
        copies = kv_bytes(self.shape, sequences, seen, self.dtype_bytes)
        return mask + copies + scores * 2 * (self.dtype_bytes + FLOAT32_BYTES)

    def _dequantized_bytes(self) -> int:
        """At whichever width it is most: what a kernel cannot take is dequantized."""
        found = 0
        for bits in PACKED_BITS:
            kernel = layer_kernel(self.shape, bits, self.kernel, self.groups)
            together = group_linears(kernel, self.shape.linears, bits, self.groups)
            products = [stack_features(group) for group in together]
            found = max(found, kernel.workspace_bytes(products, self.dtype_bytes))
        return found
