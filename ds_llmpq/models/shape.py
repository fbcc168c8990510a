"""The shape of a decoder-only model for planning: sizes, linears, parameter counts. No weights, no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ds_llmpq.errors import UserError
from ds_llmpq.models.description import read_description
from ds_llmpq.models.families import describe
from ds_llmpq.models.family import Description
from ds_llmpq.models.spec import DecoderSpec, ExpertsSpec, NormSpec


class Linear(NamedTuple):
    """One `nn.Linear` of a decoder layer: its name in the layer, the shape of its weight, and the share of the tokens
    that it sees, which is 1 except for an expert."""

    name: str
    out_features: int
    in_features: int
    token_share: float = 1.0

    @property
    def active_weights(self) -> float:
        """Weights used per token, on average."""
        return self.weights * self.token_share

    def touched_weights(self, rows: int) -> float:
        """Expected weights read for `rows` tokens, if tokens choose experts evenly and independently."""
        return self.weights if self.token_share == 1.0 else self.weights * (1 - (1 - self.token_share) ** rows)

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one decoder-only model; counts are parameters, not bytes."""

    architecture: str  # model_type of config.json
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    embed_dim: int  # of the token embedding and lm_head; differs from hidden only in OPT-350m
    max_positions: int | None  # None: no bound (ALiBi)
    sliding_window: int | None  # tokens that windowed layers look back; None: no such layers
    tied_embeddings: bool
    gated_mlp: bool
    dtype: str | None  # of the stored weights, if config.json says it
    linears: tuple[Linear, ...]  # of one decoder layer, in the order they run
    biased: tuple[str, ...]  # names of the linears that have a bias
    layer_norm_parameters: int  # of one decoder layer, including Qwen3's q_norm and k_norm, and a router
    embed_parameters: int  # everything before the first decoder layer
    head_parameters: int  # everything after the last one; lm_head counts even if tied
    spec: DecoderSpec = field(compare=False, repr=False)  # what all of this is derived from

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """From the keys of a config.json. `UserError` as in `describe` and `derive_shape`."""
        return derive_shape(describe(config))

    @property
    def linear_weights(self) -> int:
        """Weights of one decoder layer that can be quantized."""
        return sum(linear.weights for linear in self.linears)

    @property
    def active_linear_weights(self) -> float:
        """Weights of one decoder layer used per token: all, except in a mixture of experts."""
        return sum(linear.active_weights for linear in self.linears)

    @property
    def has_experts(self) -> bool:
        return any(".experts." in linear.name for linear in self.linears)

    @property
    def lm_head(self) -> Linear:
        return Linear("lm_head", self.vocab, self.embed_dim)

    def touched_share(self, rows: int) -> float:
        """Share of one decoder layer's quantizable weights that `rows` tokens read."""
        return sum(linear.touched_weights(rows) for linear in self.linears) / self.linear_weights

    @property
    def layer_bias_parameters(self) -> int:
        return sum(linear.out_features for linear in self.linears if linear.name in self.biased)

    @property
    def layer_other_parameters(self) -> int:
        """Parameters of one decoder layer that stay unquantized: norms and biases."""
        return self.layer_norm_parameters + self.layer_bias_parameters

    @property
    def layer_parameters(self) -> int:
        return self.linear_weights + self.layer_other_parameters

    @property
    def parameters(self) -> int:
        """Of the whole model; a tied lm_head counts once."""
        tied = self.vocab * self.embed_dim if self.tied_embeddings else 0
        return self.layers * self.layer_parameters + self.embed_parameters + self.head_parameters - tied

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that depend on all sizes, but not on the weights."""
        sizes = {key: getattr(self, key) for key in self.__dataclass_fields__ if key not in ("dtype", "spec")}
        sizes["linears"] = [linear if linear.token_share < 1 else linear[:3] for linear in self.linears]
        return hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:16]


def read_shape(path: str | Path) -> ModelShape:
    """Shape of the checkpoint in folder `path`. `UserError` as in `read_description`, or if layers differ."""
    return derive_shape(read_description(path))


def derive_shape(described: Description) -> ModelShape:
    """`UserError`: layers differ in their linears."""
    spec = described.spec
    linears = _list_linears(described)
    mlp = spec.layers[0].mlp
    mlp = mlp.mlp if isinstance(mlp, ExpertsSpec) else mlp
    windows = [layer.window for layer in spec.layers if layer.window is not None]
    project = spec.width * spec.hidden if spec.width != spec.hidden else 0
    table = spec.vocab * spec.width
    return ModelShape(
        architecture=described.model_type,
        layers=len(spec.layers),
        hidden=spec.hidden,
        heads=spec.attention.heads,
        kv_heads=spec.attention.kv_heads,
        head_dim=spec.attention.head_dim,
        intermediate=mlp.intermediate,
        vocab=spec.vocab,
        embed_dim=spec.width,
        max_positions=spec.max_positions,
        sliding_window=max(windows, default=None),
        tied_embeddings=spec.tied,
        gated_mlp=mlp.gated,
        dtype=described.dtype,
        linears=linears,
        biased=tuple(described.family.rename(linear.name) for linear in spec.linears(0) if linear.bias),
        layer_norm_parameters=_count_layer_norms(spec),
        embed_parameters=table
        + project
        + (spec.learned_positions or 0) * spec.hidden
        + _count_norm(spec.embedding_norm, spec.hidden),
        head_parameters=_count_norm(spec.final_norm, spec.hidden) + project + table,
        spec=spec,
    )


def _list_linears(described: Description) -> tuple[Linear, ...]:
    spec = described.spec
    if len({layer.mlp for layer in spec.layers}) > 1:
        raise UserError("config.json mixes layers with experts and layers without; such a model cannot be planned.")
    experts = spec.layers[0].mlp
    share = experts.active / experts.count if isinstance(experts, ExpertsSpec) else 1.0
    return tuple(
        Linear(
            described.family.rename(role.name), role.out_features, role.in_features,
            1.0 if role.expert is None else share,
        )
        for role in spec.linears(0)
    )  # fmt: skip


def _count_layer_norms(spec: DecoderSpec) -> int:
    norms = (4 if spec.norms == "around" else 2) * _count_norm(spec.norm, spec.hidden)
    norms += 2 * _count_norm(spec.attention.qk_norm, spec.attention.head_dim)
    experts = spec.layers[0].mlp
    return norms + (experts.count * spec.hidden if isinstance(experts, ExpertsSpec) else 0)


def _count_norm(norm: NormSpec | None, size: int) -> int:
    if norm is None or not norm.affine:
        return 0
    return 2 * size if norm.kind == "layer" else size
