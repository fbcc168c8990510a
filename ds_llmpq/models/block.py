"""One decoder block for all families, in plain torch, as a `DecoderSpec` describes it.

The host never reads a tensor's values, except to choose experts one by one (see `Experts.static`), and no shape depends
on values. So a step can be traced once and replayed. Letters in shapes: R rows (sequences), T new tokens of a row, S
tokens that attention sees, P tokens of a shared prefix, H query heads, G key/value heads, D features of a head,
N = R x T, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ds_llmpq.models.spec import DecoderSpec, ExpertsSpec, MLPSpec, NormSpec
from ds_llmpq.models.step import Step

_tanh_gelu = partial(F.gelu, approximate="tanh")
# by the names of `spec.ACTIVATIONS`
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": lambda inputs: inputs * torch.sigmoid(1.702 * inputs),
    "relu": F.relu,
    "relu2": lambda inputs: F.relu(inputs).square(),
    "relu6": F.relu6,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def cap(values: torch.Tensor, limit: float | None) -> torch.Tensor:
    """Soft-caps values to +-`limit`; None leaves them as they are."""
    return values if limit is None else limit * torch.tanh(values / limit)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates states [R, T, heads, D] by the angles of their positions; features k and k + half are a point's
    coordinates. cos, sin [R, T, features]: sin is negative in its first half. Further features are not rotated."""
    features = cos.shape[-1]
    if features < states.shape[-1]:
        return torch.cat((rotate(states[..., :features], cos, sin), states[..., features:]), -1)
    first, second = states.chunk(2, -1)
    return states * cos[:, :, None] + torch.cat((second, first), -1) * sin[:, :, None]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """query [R, H, T, D], key and value [R, G, S, D] -> [R, H, T, D]. mask [R or 1, H or 1, T, S]: true where a
    query may attend, or a bias; None: causal, and the last new token is the last of all."""
    rows, heads, tokens, size = query.shape
    groups = key.shape[1]
    if soft_cap is not None:
        return _attend_capped(query, key, value, mask, scale, soft_cap)
    if tokens == 1 and heads > groups and (mask is None or mask.shape[1] == 1):
        # The heads of a group see the same keys. As queries of one head they are one product, 5 to 9 times as fast on a
        # CPU (24 heads on 8 of 64, 32 on 8 of 128), because torch's kernel computes one head after another.
        together = query.reshape(rows, groups, heads // groups, size)
        mask = None if mask is None else mask.expand(-1, -1, heads // groups, -1)
        found = F.scaled_dot_product_attention(together, key, value, attn_mask=mask, scale=scale)
        return found.reshape(rows, heads, 1, size)
    causal = mask is None and tokens > 1
    if mask is None:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=scale, enable_gqa=heads != groups
        )
    return F.scaled_dot_product_attention(
        query, _repeat_for_heads(key, heads), _repeat_for_heads(value, heads), attn_mask=mask, scale=scale
    )


def _repeat_for_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """[R, G, S, D] -> [R, H, S, D], because torch's fast kernels do not support groups together with a mask."""
    rows, groups, tokens, size = states.shape
    if heads == groups:
        return states
    return states[:, :, None].expand(-1, -1, heads // groups, -1, -1).reshape(rows, heads, tokens, size)


def _attend_capped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float, limit: float
) -> torch.Tensor:
    """`attend` with scores capped before the softmax, which no fused kernel supports."""
    rows, heads, tokens, size = query.shape
    groups, seen = key.shape[1:3]
    together = query.reshape(rows, groups, heads // groups * tokens, size)
    scores = cap((together @ key.transpose(2, 3) * scale).view(rows, heads, tokens, seen), limit)
    if mask is None:
        mask = torch.ones(tokens, seen, dtype=torch.bool, device=query.device).tril(seen - tokens)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights.view(rows, groups, -1, seen) @ value).view(rows, heads, tokens, size)


def attend_with_prefix(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """`attend` for one new token a row, where rows have a prefix in common: its keys and values [2, G, P, D] are read
    once for all rows. query [R, H, 1, D]; mask [R, H or 1, 1, P + S]: the prefix comes first. One softmax, in float32,
    runs over the scores of both parts, which is what merging two attentions by their log-sum-exp comes to."""
    rows, heads, _, size = query.shape
    groups, common = prefix.shape[1:3]
    # The heads of a group see the same keys. Scaled first: unscaled scores can exceed float16.
    by_row = (query * scale).reshape(rows, groups, -1, size)

    def multiply_all(states: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        """[R, G, H / G, n] x [G, n, m] -> [R, G, H / G, m]: one product a group, for all rows."""
        together = states.transpose(0, 1).reshape(groups, -1, states.shape[-1]) @ matrices
        return together.view(groups, rows, -1, matrices.shape[-1]).transpose(0, 1)

    parts = multiply_all(by_row, prefix[0].transpose(1, 2)), by_row @ key.transpose(2, 3)
    scores = cap(torch.cat(parts, -1).view(rows, heads, 1, -1).float(), soft_cap)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).to(query.dtype).view(rows, groups, heads // groups, -1)
    found = multiply_all(weights[..., :common], prefix[1]) + weights[..., common:] @ value
    return found.reshape(rows, heads, 1, size)


class Norm(nn.Module):
    """Over the last `size` features."""

    def __init__(self, size: int, spec: NormSpec):
        super().__init__()
        self.spec, self.shape = spec, (size,)
        self.weight = nn.Parameter(torch.empty(size)) if spec.affine else None
        self.bias = nn.Parameter(torch.empty(size)) if spec.affine and spec.kind == "layer" else None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if self.spec.kind == "layer":
            return F.layer_norm(states, self.shape, self.weight, self.bias, self.spec.eps)
        if self.spec.plus_one:
            return F.rms_norm(states.float(), self.shape, 1 + self.weight.float(), self.spec.eps).to(states.dtype)
        # rounded to the compute dtype before the weight, as in transformers and in training
        return F.rms_norm(states, self.shape, None, self.spec.eps) * self.weight


class Attention(nn.Module):
    """`index`: number of the layer in the whole model, which the cache uses too."""

    def __init__(self, spec: DecoderSpec, index: int):
        super().__init__()
        self.spec, self.index = spec.attention, index
        self.window, self.rotary = spec.layers[index].window, spec.layers[index].rotary
        if self.spec.qk_norm is not None:
            self.q_norm = Norm(self.spec.head_dim, self.spec.qk_norm)
            self.k_norm = Norm(self.spec.head_dim, self.spec.qk_norm)

    def project(
        self, hidden: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [R, H, T, D], keys and values [R, G, T, D] of the new tokens."""
        query, key, value = self._heads(hidden)
        if self.spec.qk_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if angles is not None:
            query, key = (rotate(states, *angles) for states in (query, key))
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step) -> torch.Tensor:
        """What `project` gave, to [R, H, T, D]."""
        inputs = step.prepare_inputs()
        if step.cache is not None:
            if step.cache.in_place:
                return step.cache.attend(query, key, value, self)
            key, value = step.cache.update(key, value, self.index)
        if self.spec.alibi:
            mask = inputs["bias"]
        else:
            capped = self.spec.soft_cap is not None
            mask = step.mask(self.window) if capped else step.bias(self.window, query.dtype)
        if step.shared is None:
            return attend(query, key, value, mask, self.spec.scale, self.spec.soft_cap)
        prefix = step.cache.prefix(self.index)
        return attend_with_prefix(query, key, value, prefix, mask, self.spec.scale, self.spec.soft_cap)

    def _heads(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries [R, T, H, D], keys and values [R, T, G, D]."""
        spec, size = self.spec, self.spec.head_dim
        split = (*hidden.shape[:2], -1, size)
        if spec.qkv == "separate":
            return tuple(linear(hidden).view(split) for linear in (self.q_proj, self.k_proj, self.v_proj))
        together = self.qkv_proj(hidden).view(split)
        if spec.qkv == "interleaved":
            return tuple(together[:, :, part::3] for part in range(3))
        return together.split((spec.heads, spec.kv_heads, spec.kv_heads), 2)


class MLP(nn.Module):
    def __init__(self, spec: MLPSpec):
        super().__init__()
        self.spec, self.activation = spec, ACTIVATIONS[spec.activation]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.spec.gated:
            return self.down_proj(self.activation(self.up_proj(hidden)))
        if self.spec.stacked:
            gate, up = self.gate_up_proj(hidden).chunk(2, -1)
        else:
            gate, up = self.gate_proj(hidden), self.up_proj(hidden)
        return self.down_proj(self.activation(gate) * up)


class Router(nn.Module):
    """Chooses the experts of each token and their weights. Never quantized."""

    def __init__(self, hidden: int, spec: ExpertsSpec):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.count, hidden))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden] -> weights [N, E] in float32, zero for all but the `active` most probable."""
        probabilities = F.linear(hidden, self.weight).softmax(-1, dtype=torch.float32)
        top, chosen = probabilities.topk(self.spec.active, -1)
        if self.spec.normalized:
            top = top / top.sum(-1, keepdim=True)
        return torch.zeros_like(probabilities).scatter_(-1, chosen, top)


class Experts(nn.Module):
    """MLPs of which each token uses a few. Each expert computes its own tokens. With `static`, every expert computes
    every token, with weight 0 if it was not chosen: `count / active` times the work, but with the fixed shapes that
    graphs need."""

    def __init__(self, hidden: int, spec: ExpertsSpec):
        super().__init__()
        self.gate = Router(hidden, spec)
        self.experts = nn.ModuleList(MLP(spec.mlp) for _ in range(spec.count))
        self.static = False

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        weights = self.gate(flat)
        total = torch.zeros_like(flat)
        if self.static:
            for expert, share in zip(self.experts, weights.unbind(-1), strict=True):
                total += (expert(flat) * share[:, None]).to(total.dtype)
            return total.view(hidden.shape)
        tokens, chosen = weights.T.nonzero(as_tuple=True)[::-1]
        places = tokens.split(torch.bincount(chosen, minlength=len(self.experts)).tolist())
        for number, (expert, rows) in enumerate(zip(self.experts, places, strict=True)):
            if len(rows):
                outputs = expert(flat[rows]) * weights[rows, number, None]
                total.index_add_(0, rows, outputs.to(total.dtype))
        return total.view(hidden.shape)


class Block(nn.Module):
    """Decoder layer `index` as a pipeline layer, from hidden states [R, T, hidden] to hidden states. Its parameters are
    empty until a checkpoint fills them. Its linears may be replaced by equivalent modules (`quant`)."""

    def __init__(self, spec: DecoderSpec, index: int):
        super().__init__()
        self.spec, mlp = spec, spec.layers[index].mlp
        self.self_attn = Attention(spec, index)
        self.mlp = Experts(spec.hidden, mlp) if isinstance(mlp, ExpertsSpec) else MLP(mlp)
        for linear in spec.linears(index):
            self.set_submodule(linear.name, nn.Linear(linear.in_features, linear.out_features, linear.bias))
        self.attention_norm, self.mlp_norm = Norm(spec.hidden, spec.norm), Norm(spec.hidden, spec.norm)
        around = spec.norms == "around"
        self.attention_out_norm = Norm(spec.hidden, spec.norm) if around else None
        self.mlp_out_norm = Norm(spec.hidden, spec.norm) if around else None

        # what lies before attention and behind it; compiled versions can take their place (`engine.runner.fusion`)
        self.halves = Block.enter, Block.leave

    def forward(self, step: Step) -> Step:
        enter, leave = self.halves
        inputs, rotary = step.prepare_inputs(), self.self_attn.rotary
        normed, query, key, value = enter(self, step.hidden, None if rotary is None else inputs[rotary])
        residual = normed if self.spec.residual_from_norm else step.hidden
        attended = self.self_attn(query, key, value, step)
        del normed, query, key, value  # the MLP runs without them
        step.hidden = leave(self, residual, attended)
        return step

    def enter(
        self, hidden: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """[R, T, hidden] -> the input of attention [R, T, hidden]; queries, keys and values (`Attention.project`)."""
        normed = self._norm(hidden, self.attention_norm)
        return normed, *self.self_attn.project(normed, angles)

    def leave(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """[R, T, hidden], and what attention gave [R, H, T, D] -> [R, T, hidden]."""
        rows, tokens = residual.shape[:2]
        hidden = self._add(
            residual,
            self.self_attn.o_proj(attended.transpose(1, 2).reshape(rows, tokens, -1)),
            self.attention_norm,
            self.attention_out_norm,
        )
        normed = self._norm(hidden, self.mlp_norm)
        residual = normed if self.spec.residual_from_norm else hidden
        return self._add(residual, self.mlp(normed), self.mlp_norm, self.mlp_out_norm)

    def _norm(self, hidden: torch.Tensor, norm: Norm) -> torch.Tensor:
        return hidden if self.spec.norms == "after" else norm(hidden)

    def _add(self, residual: torch.Tensor, outputs: torch.Tensor, norm: Norm, out_norm: Norm | None) -> torch.Tensor:
        if self.spec.norms == "after":
            return norm(residual + outputs)
        return residual + (outputs if out_norm is None else out_norm(outputs))
