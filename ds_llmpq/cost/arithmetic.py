"""FLOPs and bytes of the parts of a model: the one place where work is counted, used by memory and latency alike.

`rows` is the number of tokens in a micro-batch: sequences x new tokens each. A multiply-add counts as two FLOPs.
"""

from __future__ import annotations

from ds_llmpq.models.shape import ModelShape

FLOAT32_BYTES = 4


def linear_flops(shape: ModelShape, rows: int) -> int:
    """Of the linears of one decoder layer; of a mixture's experts, those that a token chooses."""
    return round(2 * rows * shape.active_linear_weights)


def linear_activation_bytes(shape: ModelShape, rows: int, dtype_bytes: int) -> int:
    """Inputs read and outputs written by the linears of one decoder layer."""
    widths = sum((linear.in_features + linear.out_features) * linear.token_share for linear in shape.linears)
    return round(rows * dtype_bytes * widths)


def attention_flops(shape: ModelShape, sequences: int, new_tokens: int, past_tokens: int) -> int:
    """Scores and weighted values. Causal: token k of the new ones sees past + k + 1 tokens."""
    seen = new_tokens * past_tokens + new_tokens * (new_tokens + 1) // 2
    return 4 * sequences * shape.heads * shape.head_dim * seen


def kv_bytes(shape: ModelShape, sequences: int, tokens: int, dtype_bytes: int) -> int:
    """Keys and values of one decoder layer: 2 x sequences x key/value heads x tokens x head size."""
    return 2 * sequences * shape.kv_heads * tokens * shape.head_dim * dtype_bytes


def score_entries(shape: ModelShape, sequences: int, new_tokens: int, past_tokens: int) -> int:
    return sequences * shape.heads * new_tokens * (past_tokens + new_tokens)


def attention_bytes(shape: ModelShape, sequences: int, new_tokens: int, past_tokens: int, dtype_bytes: int) -> int:
    """Queries and the outcome once, keys and values of all tokens once, new ones written to the cache.

    Capped scores (Gemma 2) are in no fused kernel: the cached keys and values are copied first (one write and one more
    read), and about eight passes go over the score matrix: scores, mask, float32 softmax (twice 4 bytes), conversion,
    weighted sum. ALiBi's bias is read for each score.
    """
    queries = 2 * sequences * new_tokens * shape.heads * shape.head_dim * dtype_bytes
    read = kv_bytes(shape, sequences, past_tokens + new_tokens, dtype_bytes)
    written = kv_bytes(shape, sequences, new_tokens, dtype_bytes)
    total = queries + read + written
    if shape.spec.attention.soft_cap is not None:
        scores = score_entries(shape, sequences, new_tokens, past_tokens)
        total += 2 * read + scores * (6 * dtype_bytes + 2 * FLOAT32_BYTES)
    if shape.spec.attention.alibi:
        total += score_entries(shape, sequences, new_tokens, past_tokens) * dtype_bytes
    return total


def elementwise_bytes(shape: ModelShape, rows: int, dtype_bytes: int) -> int:
    """Norms (read, write) and residual sums (two reads, write), two of each; activation and gate; rotary embedding."""
    activation = (5 if shape.gated_mlp else 2) * shape.intermediate
    rotary = 0
    if shape.spec.rotary:  # x * cos + rotate(x) * sin: about six passes over queries and keys
        rotary = 6 * (shape.heads + shape.kv_heads) * shape.head_dim
    return rows * dtype_bytes * (10 * shape.hidden + activation + rotary)


def embed_bytes_moved(shape: ModelShape, rows: int, dtype_bytes: int) -> int:
    """Rows looked up and written; tables themselves are not read through."""
    return rows * dtype_bytes * (2 * shape.embed_dim + 2 * shape.hidden)


def embed_flops(shape: ModelShape, rows: int) -> int:
    """Only OPT-350m's project_in multiplies."""
    return 2 * rows * shape.embed_dim * shape.hidden if shape.embed_dim != shape.hidden else 0


def head_flops(shape: ModelShape, rows: int) -> int:
    """Of lm_head and, in OPT-350m, project_out."""
    project = shape.embed_dim * shape.hidden if shape.embed_dim != shape.hidden else 0
    return 2 * rows * (shape.vocab * shape.embed_dim + project)


def head_bytes_moved(shape: ModelShape, rows: int, dtype_bytes: int, matrix_bytes: int) -> int:
    """All head weights, hidden states in, logits out, and one float32 pass that picks the token. matrix_bytes: what is
    read of lm_head."""
    weights = matrix_bytes + (shape.head_parameters - shape.lm_head.weights) * dtype_bytes
    return weights + rows * (2 * shape.hidden * dtype_bytes + shape.vocab * (2 * dtype_bytes + 2 * FLOAT32_BYTES))
