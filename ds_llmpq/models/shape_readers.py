"""Shapes from the config.json of each architecture that can be run. No torch.

Defaults for keys that a config.json leaves out are those of the transformers config classes, which differ from one
architecture to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ds_llmpq.errors import UserError, shown
from ds_llmpq.models.shape import Linear, ModelShape
from ds_llmpq.validation import MOST_COUNT

_LAYER_TYPES = ("full_attention", "sliding_attention")


class _Keys:
    """Checked access to a config.json: a key may have older names, and null counts as left out unless said."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config

    def get(self, *names: str, default: Any = None) -> Any:
        return next((self.config[name] for name in names if self.config.get(name) is not None), default)

    def count(self, *names: str, default: int | None = None) -> int:
        value = self.get(*names, default=default)
        if value is None:
            raise UserError(f"config.json of this {self.config['model_type']} model lacks {' or '.join(names)}; add it")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_COUNT:
            raise UserError(f"config.json has {names[0]}={shown(value)}; it must be a positive whole number")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default=default)
        if not isinstance(value, bool):
            raise UserError(f"config.json has {name}={value!r}; it must be true or false")
        return value

    def kv_heads(self, heads: int, absent: int) -> int:
        """`absent` is the config class's default; an explicit null means as many as attention heads."""
        present = "num_key_value_heads" in self.config
        value = self.count("num_key_value_heads", default=heads if present else absent)
        if heads % value:
            raise UserError(
                f"config.json has num_attention_heads={heads}, not a multiple of num_key_value_heads={value}"
            )
        return value

    def split_heads(self, hidden: int, heads: int) -> int:
        if hidden % heads:
            raise UserError(f"config.json has hidden_size={hidden}, not a multiple of its {heads} attention heads")
        return hidden // heads

    def check_layer_types(self) -> None:
        named = self.get("layer_types", default=[])
        wrong = [kind for kind in named if kind not in _LAYER_TYPES] if isinstance(named, list) else [named]
        if wrong:
            raise UserError(
                f"config.json has layer_types with {shown(wrong[0])}; supported are {' and '.join(_LAYER_TYPES)}"
            )

    def dtype(self) -> str | None:
        value = self.get("dtype", "torch_dtype")
        return str(value).removeprefix("torch.") if value is not None else None


@dataclass(frozen=True)
class _Defaults:
    """What a config class of the Llama family takes for keys that are left out. None as kv_heads: as many as heads; as
    head_dim: hidden / heads."""

    positions: int
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    tied: bool = False


_DEFAULTS = {
    "llama": _Defaults(2048),
    "mistral": _Defaults(131072, 8, window=4096),
    "mixtral": _Defaults(131072, 8),
    "qwen2": _Defaults(32768, 32, window=4096),
    "qwen3": _Defaults(32768, 32, 128, window=4096),
    "qwen3_moe": _Defaults(32768, 4, window=4096),
    "phi3": _Defaults(4096),
    "gemma2": _Defaults(8192, 4, 256, window=4096, tied=True),
    "gemma3_text": _Defaults(131072, 4, 256, window=4096, tied=True),
}
_QK_NORMS = ("qwen3", "qwen3_moe", "gemma3_text")


def _llama_family(keys: _Keys) -> ModelShape:
    """Llama and what derives from it: RMS norms, rotary positions, gated MLP, grouped key/value heads."""
    architecture = keys.config["model_type"]
    hidden, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    defaults = _DEFAULTS[architecture]
    kv_heads = keys.kv_heads(heads, absent=defaults.kv_heads or heads)
    # only where hidden is divided must it be a multiple of heads
    head_dim = keys.get("head_dim", default=defaults.head_dim)
    head_dim = keys.split_heads(hidden, heads) if head_dim is None else keys.count("head_dim", default=head_dim)
    intermediate, vocab = keys.count("intermediate_size"), keys.count("vocab_size")
    if architecture != "llama":
        keys.check_layer_types()
    linears = _linears_of_llama_family(hidden, heads * head_dim, kv_heads * head_dim, intermediate)
    return ModelShape(
        architecture=architecture,
        layers=keys.count("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocab=vocab,
        embed_dim=hidden,
        max_positions=keys.count("max_position_embeddings", default=defaults.positions),
        sliding_window=_window_of_llama_family(architecture, keys),
        tied_embeddings=keys.flag("tie_word_embeddings", defaults.tied),
        gated_mlp=True,
        dtype=keys.dtype(),
        linears=linears,
        biased=_biases_of_llama_family(architecture, keys, linears),
        layer_norm_parameters=2 * hidden + (2 * head_dim if architecture in _QK_NORMS else 0),
        embed_parameters=vocab * hidden,
        head_parameters=hidden + vocab * hidden,
    )


def _linears_of_llama_family(hidden: int, queries: int, keys: int, intermediate: int) -> tuple[Linear, ...]:
    return (
        Linear("self_attn.q_proj", queries, hidden),
        Linear("self_attn.k_proj", keys, hidden),
        Linear("self_attn.v_proj", keys, hidden),
        Linear("self_attn.o_proj", hidden, queries),
        Linear("mlp.gate_proj", intermediate, hidden),
        Linear("mlp.up_proj", intermediate, hidden),
        Linear("mlp.down_proj", hidden, intermediate),
    )


def _window_of_llama_family(architecture: str, keys: _Keys) -> int | None:
    """Of the layers that have one."""
    if architecture == "llama" or (architecture.startswith("qwen") and not keys.flag("use_sliding_window", False)):
        return None
    if "sliding_window" in keys.config:
        return keys.config["sliding_window"]
    return _DEFAULTS[architecture].window


def _gemma(keys: _Keys) -> ModelShape:
    """Gemma 2 and 3: a second norm around each half of a layer."""
    plain = _llama_family(keys)
    return replace(plain, layer_norm_parameters=plain.layer_norm_parameters + 2 * plain.hidden)


def _phi3(keys: _Keys) -> ModelShape:
    """Phi-3: linears of one input are one."""
    plain = _llama_family(keys)
    query, key, value, output, gate, up, down = plain.linears
    qkv = Linear("self_attn.qkv_proj", query.out_features + key.out_features + value.out_features, plain.hidden)
    gate_up = Linear("mlp.gate_up_proj", gate.out_features + up.out_features, plain.hidden)
    return replace(plain, linears=(qkv, output, gate_up, down))


def _mixtral(keys: _Keys) -> ModelShape:
    """Mixtral: a Mistral layer whose MLP is one of several experts for each token."""
    plain, experts = _llama_family(keys), keys.count("num_local_experts", default=8)
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    return _with_experts(keys, plain, experts, 2, "block_sparse_moe", names)


def _qwen3_moe(keys: _Keys) -> ModelShape:
    """Qwen3-MoE: a Qwen3 layer with many small experts. `UserError`: only some of its layers have experts."""
    experts = keys.count("num_experts", "num_local_experts", default=128)
    dense = keys.get("mlp_only_layers", default=[]), keys.count("decoder_sparse_step", default=1)
    if dense != ([], 1):
        raise UserError("config.json has layers without experts among others with them; such a model cannot be planned")
    small = keys.count("moe_intermediate_size", default=768)
    plain = _llama_family(_Keys({**keys.config, "intermediate_size": small}))
    names = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
    return _with_experts(keys, plain, experts, 8, "mlp", names)


def _with_experts(
    keys: _Keys, plain: ModelShape, experts: int, active: int, place: str, names: Mapping[str, str]
) -> ModelShape:
    """Experts called `names` under `place` instead of the MLP; the router stays unquantized. active: the default of how
    many a token takes."""
    active = keys.count("num_experts_per_tok", default=active)
    if active > experts:
        raise UserError(f"config.json has num_experts_per_tok={active}, more than its {experts} experts")
    mlp = [linear for linear in plain.linears if linear.name.startswith("mlp.")]
    linears = [linear for linear in plain.linears if not linear.name.startswith("mlp.")]
    for expert in range(experts):
        for linear in mlp:
            name = f"{place}.experts.{expert}.{names[linear.name.removeprefix('mlp.')]}"
            linears.append(linear._replace(name=name, token_share=active / experts))
    return replace(
        plain, linears=tuple(linears), layer_norm_parameters=plain.layer_norm_parameters + experts * plain.hidden
    )


def _biases_of_llama_family(architecture: str, keys: _Keys, linears: tuple[Linear, ...]) -> tuple[str, ...]:
    names = [linear.name for linear in linears]
    if architecture == "qwen2":  # q, k and v always, o never; its class reads no flag
        return tuple(names[:3])
    if architecture in ("mistral", "mixtral", "phi3"):
        return ()
    attention = names[:4] if keys.flag("attention_bias", False) else []
    mlp = names[4:] if architecture == "llama" and keys.flag("mlp_bias", False) else []
    return tuple(attention + mlp)


def _opt(keys: _Keys) -> ModelShape:
    """OPT: learned positions (table shifted by 2), layer norms, plain MLP, narrow embedding in the 350m model."""
    hidden, heads, ffn = keys.count("hidden_size"), keys.count("num_attention_heads"), keys.count("ffn_dim")
    vocab, positions = keys.count("vocab_size"), keys.count("max_position_embeddings", default=2048)
    width = keys.count("word_embed_proj_dim", default=hidden)
    project = width * hidden if width != hidden else 0
    norm = 2 * hidden if keys.flag("layer_norm_elementwise_affine", True) else 0
    has_final_norm = keys.flag("do_layer_norm_before", True) and not keys.flag("_remove_final_layer_norm", False)
    linears = (
        *(Linear(f"self_attn.{part}_proj", hidden, hidden) for part in ("q", "k", "v", "out")),
        Linear("fc1", ffn, hidden),
        Linear("fc2", hidden, ffn),
    )
    return ModelShape(
        architecture="opt",
        layers=keys.count("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=keys.split_heads(hidden, heads),
        intermediate=ffn,
        vocab=vocab,
        embed_dim=width,
        max_positions=positions,
        sliding_window=None,
        tied_embeddings=keys.flag("tie_word_embeddings", True),
        gated_mlp=False,
        dtype=keys.dtype(),
        linears=linears,
        biased=tuple(linear.name for linear in linears) if keys.flag("enable_bias", True) else (),
        layer_norm_parameters=2 * norm,
        embed_parameters=vocab * width + (positions + 2) * hidden + project,
        head_parameters=(norm if has_final_norm else 0) + project + vocab * width,
    )


def _bloom(keys: _Keys) -> ModelShape:
    """BLOOM: ALiBi, so no bound on positions; fused query/key/value; a layer norm after the embedding."""
    hidden, heads = keys.count("n_embed", "hidden_size"), keys.count("n_head", "num_attention_heads")
    vocab = keys.count("vocab_size")
    linears = (
        Linear("self_attention.query_key_value", 3 * hidden, hidden),
        Linear("self_attention.dense", hidden, hidden),
        Linear("mlp.dense_h_to_4h", 4 * hidden, hidden),
        Linear("mlp.dense_4h_to_h", hidden, 4 * hidden),
    )
    return ModelShape(
        architecture="bloom",
        layers=keys.count("n_layer", "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=keys.split_heads(hidden, heads),
        intermediate=4 * hidden,
        vocab=vocab,
        embed_dim=hidden,
        max_positions=None,
        sliding_window=None,
        tied_embeddings=keys.flag("tie_word_embeddings", True),
        gated_mlp=False,
        dtype=keys.dtype(),
        linears=linears,
        biased=tuple(linear.name for linear in linears),
        layer_norm_parameters=4 * hidden,
        embed_parameters=vocab * hidden + 2 * hidden,
        head_parameters=2 * hidden + vocab * hidden,
    )


_READERS: dict[str, Callable[[_Keys], ModelShape]] = {
    "llama": _llama_family,
    "mistral": _llama_family,
    "qwen2": _llama_family,
    "qwen3": _llama_family,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "phi3": _phi3,
    "gemma2": _gemma,
    "gemma3_text": _gemma,
    "opt": _opt,
    "bloom": _bloom,
}


def read(config: Mapping[str, Any]) -> ModelShape:
    """As `ModelShape.from_config`."""
    architecture = config.get("model_type")
    if not isinstance(architecture, str) or architecture not in _READERS:
        raise UserError(
            f"model_type {architecture!r} is not supported; supported architectures are {', '.join(_READERS)}"
        )
    return _READERS[architecture](_Keys(config))
