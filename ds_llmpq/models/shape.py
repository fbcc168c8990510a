"""The shape of a decoder-only model, read from its Hugging Face config.json: sizes, linear layers, parameter counts.

Everything that plans needs to know about a model is here; no weights, no torch. Defaults for keys that a config.json
leaves out are those of the transformers config classes, which differ from one architecture to the next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ds_llmpq.errors import UserError, shown
from ds_llmpq.files import check_files, read_json
from ds_llmpq.models.tying import stores_own_head
from ds_llmpq.validation import MOST_COUNT, Plain, checked


class Linear(NamedTuple):
    """One `nn.Linear` of a decoder layer: its name inside the layer and the shape of its weight. An expert of a mixture
    sees only a share of the tokens."""

    name: str
    out_features: int
    in_features: int
    token_share: float = 1.0

    @property
    def active_weights(self) -> float:
        """Weights that work on a token, on average."""
        return self.weights * self.token_share

    def touched_weights(self, rows: int) -> float:
        """Weights that are read for `rows` tokens, expected where tokens choose experts evenly and independently."""
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
    embed_dim: int  # width of the token embedding and of lm_head; differs from hidden in OPT-350m alone
    max_positions: int | None  # None: no bound (ALiBi)
    sliding_window: int | None  # attention looks back so many tokens; None: to the first token
    tied_embeddings: bool
    gated_mlp: bool
    dtype: str | None  # type of the stored weights, where config.json says it
    linears: tuple[Linear, ...]  # of one decoder layer, in the order they run
    biased: tuple[str, ...]  # names of the linears that have a bias
    layer_norm_parameters: int  # norms of one decoder layer, with Qwen3's q_norm and k_norm, and a router
    embed_parameters: int  # everything before the first decoder layer
    head_parameters: int  # everything after the last one; lm_head counts even when tied

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read the keys of a config.json. UserError: unsupported architecture, missing or unusable key."""
        architecture = config.get("model_type")
        if not isinstance(architecture, str) or architecture not in _READERS:
            raise UserError(
                f"model_type {architecture!r} is not supported; supported architectures are {', '.join(_READERS)}"
            )
        return _READERS[architecture](_Keys(config))

    @property
    def linear_weights(self) -> int:
        """Weights of one decoder layer that can be quantized."""
        return sum(linear.weights for linear in self.linears)

    @property
    def active_linear_weights(self) -> float:
        """Weights of one decoder layer that work on a token; all of them but in a mixture of experts."""
        return sum(linear.active_weights for linear in self.linears)

    @property
    def output_matrix(self) -> Linear:
        """lm_head."""
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
        """16 hexadecimal digits that change with any size; it knows nothing of the weights' values."""
        sizes = {key: value for key, value in asdict(self).items() if key != "dtype"}
        sizes["linears"] = [linear if linear.token_share < 1 else linear[:3] for linear in self.linears]
        return hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:16]


def read_shape(path: str | Path) -> ModelShape:
    """Shape of the checkpoint in folder `path`; its weights say whether the output matrix is the embedding. UserError:
    no folder, no config.json, not JSON, not supported."""
    config = read_config(path)
    shape = ModelShape.from_config(config)
    if shape.tied_embeddings and stores_own_head(path, shape.architecture):
        return replace(shape, tied_embeddings=False)
    return shape


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of the folder `path`, as it stands there. UserError: no folder, no config.json, no JSON object."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist; give a local folder in Hugging Face format")
    check_files(folder, "Checkpoint file", "fetch the checkpoint again")
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"model folder {folder} has no config.json; give a local folder in Hugging Face format")
    what, remedy = "Model configuration", "mend the file, or fetch it again"
    return checked(Plain, read_json(file, what, remedy), f"{what} {file}", remedy)


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


def _llama_family(keys: _Keys) -> ModelShape:
    """Llama, Mistral, Qwen2, Qwen3: RMS norms, rotary positions, gated MLP, grouped key/value heads."""
    architecture = keys.config["model_type"]
    hidden, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    kv_heads = keys.kv_heads(heads, absent={"llama": heads, "mistral": 8, "qwen2": 32, "qwen3": 32}[architecture])
    # Qwen3's class has 128 as its default; the others divide, and only then must hidden be a multiple of heads.
    head_dim = keys.get("head_dim", default=128 if architecture == "qwen3" else None)
    head_dim = keys.split_heads(hidden, heads) if head_dim is None else keys.count("head_dim", default=head_dim)
    intermediate, vocab = keys.count("intermediate_size"), keys.count("vocab_size")
    linears = (
        Linear("self_attn.q_proj", heads * head_dim, hidden),
        Linear("self_attn.k_proj", kv_heads * head_dim, hidden),
        Linear("self_attn.v_proj", kv_heads * head_dim, hidden),
        Linear("self_attn.o_proj", hidden, heads * head_dim),
        Linear("mlp.gate_proj", intermediate, hidden),
        Linear("mlp.up_proj", intermediate, hidden),
        Linear("mlp.down_proj", hidden, intermediate),
    )
    window = {"mistral": 4096, "qwen2": 4096, "qwen3": 4096}.get(architecture)
    if "sliding_window" in keys.config:
        window = keys.config["sliding_window"]
    if architecture == "llama" or (architecture != "mistral" and not keys.flag("use_sliding_window", False)):
        window = None
    if architecture != "llama":
        keys.check_layer_types()
    positions = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}[architecture]
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
        max_positions=keys.count("max_position_embeddings", default=positions),
        sliding_window=window,
        tied_embeddings=keys.flag("tie_word_embeddings", False),
        gated_mlp=True,
        dtype=keys.dtype(),
        linears=linears,
        biased=_biases_of_llama_family(architecture, keys, linears),
        layer_norm_parameters=2 * hidden + (2 * head_dim if architecture == "qwen3" else 0),
        embed_parameters=vocab * hidden,
        head_parameters=hidden + vocab * hidden,
    )


def _mixtral(keys: _Keys) -> ModelShape:
    """Mixtral: a Mistral layer whose MLP is one of several experts for each token; the router stays unquantized."""
    plain = _llama_family(_Keys({**keys.config, "model_type": "mistral", "sliding_window": None}))
    experts = keys.count("num_local_experts", default=8)
    active = keys.count("num_experts_per_tok", default=2)
    if active > experts:
        raise UserError(f"config.json has num_experts_per_tok={active}, more than its {experts} experts")
    names = {"mlp.gate_proj": "w1", "mlp.up_proj": "w3", "mlp.down_proj": "w2"}
    mlp = [linear for linear in plain.linears if linear.name in names]
    linears = [linear for linear in plain.linears if linear.name not in names]
    for expert in range(experts):
        for linear in mlp:
            name = f"block_sparse_moe.experts.{expert}.{names[linear.name]}"
            linears.append(linear._replace(name=name, token_share=active / experts))
    return replace(
        plain,
        architecture="mixtral",
        linears=tuple(linears),
        layer_norm_parameters=plain.layer_norm_parameters + experts * plain.hidden,
    )


def _biases_of_llama_family(architecture: str, keys: _Keys, linears: tuple[Linear, ...]) -> tuple[str, ...]:
    names = [linear.name for linear in linears]
    if architecture == "qwen2":  # q, k and v always, o never; its class reads no flag
        return tuple(names[:3])
    if architecture == "mistral":
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
    "opt": _opt,
    "bloom": _bloom,
    "mixtral": _mixtral,
}

# whose times and memory are known, but whose layers the engine does not have
_PLANNED_ONLY = {"mixtral": "mixtures of experts"}


def refuse_planned_only(architecture: str) -> None:
    """`UserError` for a model that `plan` and `export` take and no other command does."""
    if architecture in _PLANNED_ONLY:
        raise UserError(
            f"model_type {architecture!r} can be planned and exported, but not run, quantized or measured: the engine "
            f"has no {_PLANNED_ONLY[architecture]}; run it with another system (`ds-llmpq export`)."
        )
