"""A decoder-only model as plain data: the description that planning, the block, the loader and graphs read.

A family file (`models.families`) builds a `DecoderSpec` from the keys of a config.json. Nothing here loads torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ds_llmpq.errors import UserError

# names as in transformers; the functions are in `models.block`
ACTIVATIONS = (
    "silu", "swish", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2",
    "relu6", "mish", "tanh", "sigmoid",
)  # fmt: skip


@dataclass(frozen=True)
class NormSpec:
    """`rms` norms by root mean square, with a weight; `layer` by mean and variance, with weight and bias, or with
    neither if not `affine`. `plus_one`: the stored weight is one less, and is multiplied in float32 (Gemma)."""

    kind: Literal["rms", "layer"]
    eps: float
    affine: bool = True
    plus_one: bool = False


@dataclass(frozen=True)
class RotarySpec:
    """The first `features` of a head are rotated; `models.rotary` computes the frequencies.

    exponents_of: the exponents of `theta` are shares of so many features. scaling multiplies cosine and sine. longrope:
    sequences of more than `original_positions` tokens use `long_factors`.
    """

    kind: Literal["default", "linear", "llama3", "yarn", "longrope"]
    features: int
    exponents_of: int
    theta: float
    factor: float = 1.0
    original_positions: float = 0.0
    scaling: float = 1.0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class AttentionSpec:
    """Query heads share key/value heads in groups of `heads / kv_heads`.

    qkv: three linears, or one whose outputs are queries, keys and values, one after another (`stacked`) or head by head
    (`interleaved`). scale multiplies the scores. soft_cap: scores become soft_cap x tanh(scores / soft_cap). alibi: a
    bias proportional to the key's position, with a slope for each head. qk_norm: over the features of each head.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qkv: Literal["separate", "stacked", "interleaved"] = "separate"
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: NormSpec | None = None
    soft_cap: float | None = None
    alibi: bool = False


@dataclass(frozen=True)
class MLPSpec:
    """down(activation(up(x))), or, `gated`, down(activation(gate(x)) * up(x)). `stacked`: gate and up are one linear.
    activation: one of `ACTIVATIONS`."""

    intermediate: int
    activation: str
    gated: bool = True
    bias: bool = False
    down_bias: bool = True  # if there are biases at all
    stacked: bool = False


@dataclass(frozen=True)
class ExpertsSpec:
    """`count` MLPs. A token uses the `active` most probable ones, weighted by their probabilities, which are divided by
    their sum if `normalized`. `UserError`: more are active than exist."""

    count: int
    active: int
    normalized: bool
    mlp: MLPSpec

    def __post_init__(self) -> None:
        if self.active > self.count:
            raise UserError(f"config.json has num_experts_per_tok={self.active}, more than its {self.count} experts.")


@dataclass(frozen=True)
class LayerSpec:
    """What may differ between layers. window: tokens that attention looks back, None: all. rotary: a name in
    `DecoderSpec.rotary`, None: positions enter elsewhere."""

    mlp: MLPSpec | ExpertsSpec
    window: int | None = None
    rotary: str | None = None


class LinearRole(NamedTuple):
    """A linear of a decoder layer: its name in the block, the shape of its weight, and its input. Linears with the same
    `input` read the same tensor and may run as one product. `expert`: number of the expert, if it belongs to one."""

    name: str
    out_features: int
    in_features: int
    bias: bool
    input: str
    expert: int | None = None


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only model. Sizes count features, `vocab` tokens.

    max_positions: tokens of the longest sequence it was made for, None: any. norms: each half of a layer is
    x + f(norm(x)) (`before`), norm(x + f(x)) (`after`), or x + norm(f(norm(x))) (`around`). residual_from_norm:
    norm(x) + f(norm(x)) instead of the first. embedding_width: of the token embedding and lm_head, if projections lead
    to and from `hidden`. learned_positions: rows of a table that is added to the embedding. embedding_scale multiplies
    the embedding. logit_cap: as `AttentionSpec.soft_cap`.
    """

    hidden: int
    vocab: int
    norm: NormSpec
    attention: AttentionSpec
    layers: tuple[LayerSpec, ...]
    max_positions: int | None = None
    rotary: tuple[tuple[str, RotarySpec], ...] = ()
    norms: Literal["before", "after", "around"] = "before"
    residual_from_norm: bool = False
    embedding_width: int = 0  # 0: `hidden`
    embedding_scale: float | None = None
    embedding_norm: NormSpec | None = None
    learned_positions: int | None = None
    position_offset: int = 0
    final_norm: NormSpec | None = None
    logit_cap: float | None = None
    tied: bool = False

    @property
    def splits_prompts(self) -> bool:
        """Whether a prompt may be computed in parts: longrope chooses its angles by a row's whole length."""
        return all(rotary.kind != "longrope" for _, rotary in self.rotary)

    @property
    def width(self) -> int:
        """Of the token embedding."""
        return self.embedding_width or self.hidden

    def linears(self, index: int) -> tuple[LinearRole, ...]:
        """The linears of decoder layer `index` in the order they run: those that are quantized. A router is not."""
        return (
            *_list_attention_linears(self.hidden, self.attention),
            *_list_mlp_linears(self.hidden, self.layers[index].mlp),
        )


def _list_attention_linears(hidden: int, spec: AttentionSpec) -> list[LinearRole]:
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    parts = {"q": queries, "k": keys, "v": keys} if spec.qkv == "separate" else {"qkv": queries + 2 * keys}
    linears = [
        LinearRole(f"self_attn.{part}_proj", size, hidden, spec.qkv_bias, "attention") for part, size in parts.items()
    ]
    return [*linears, LinearRole("self_attn.o_proj", hidden, queries, spec.output_bias, "attended")]


def _list_mlp_linears(hidden: int, spec: MLPSpec | ExpertsSpec) -> list[LinearRole]:
    if isinstance(spec, ExpertsSpec):
        plain = _list_mlp_linears(hidden, spec.mlp)
        return [_place_in_expert(linear, expert) for expert in range(spec.count) for linear in plain]
    size = spec.intermediate
    parts = ("gate_up",) if spec.stacked else ("gate", "up") if spec.gated else ("up",)
    out = 2 * size if spec.stacked else size
    linears = [LinearRole(f"mlp.{part}_proj", out, hidden, spec.bias, "mlp") for part in parts]
    return [*linears, LinearRole("mlp.down_proj", hidden, size, spec.bias and spec.down_bias, "activated")]


def _place_in_expert(linear: LinearRole, expert: int) -> LinearRole:
    name = linear.name.replace("mlp.", f"mlp.experts.{expert}.")
    return linear._replace(name=name, input=f"expert {expert} {linear.input}", expert=expert)
