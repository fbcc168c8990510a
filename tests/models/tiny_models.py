"""Small random transformers models of all families and their variations, and our modules filled from them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import nn

from ds_llmpq.engine.kv_cache import KVStore
from ds_llmpq.models.block import Experts
from ds_llmpq.models.decoder import Decoder
from ds_llmpq.models.description import read_description
from ds_llmpq.models.step import Step


class Stage(nn.Module):
    """Layers one after another, as a pipeline stage has them."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, step):
        for part in self.parts:
            step = part(step)
        return step


LAYERS, VOCABULARY = 3, 96
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 40, "sliding_window": 6, "tie_word_embeddings": True}
_OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64, "tie_word_embeddings": True}
_BLOOM = {"n_layer": LAYERS, "n_head": 4, "tie_word_embeddings": True}
_LONG = {"short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.5, 2.0, 3.0, 4.0]}
_QWEN_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
_MIXED = ["full_attention", "sliding_attention", "sliding_attention"]


def _rope(kind: str, **parameters: object) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **parameters}}


def oracle_attention(config: transformers.PreTrainedConfig) -> str | None:
    """How transformers is to attend: its own choice, but for Gemma 2, which caps scores. There transformers 5.17
    chooses SDPA and leaves the cap out."""
    return "eager" if config.model_type == "gemma2" else None


# name -> (model_type, fields of its configuration)
MODELS = {
    "llama": ("llama", {}),
    "llama-one-group": ("llama", {"num_key_value_heads": 1, "head_dim": 24}),
    "llama-all-heads": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "llama-linear": ("llama", _rope("linear", factor=4.0)),
    "llama-dynamic": ("llama", _rope("dynamic", factor=2.0)),
    "llama-yarn": ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama-yarn-mscale": (
        "llama",
        _rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.2, truncate=False),
    ),
    "llama-llama3": (
        "llama",
        _rope("llama3", factor=8.0, original_max_position_embeddings=32, low_freq_factor=1.0, high_freq_factor=4.0),
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "layer_types": _MIXED}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3-biases-tied": ("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "opt": ("opt", _OPT),
    "opt-projected-post-norm": (
        "opt",
        _OPT | {"word_embed_proj_dim": 32, "do_layer_norm_before": False, "tie_word_embeddings": False},
    ),
    "opt-plain": (
        "opt",
        _OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    ),
    "opt-no-final-norm": ("opt", _OPT | {"_remove_final_layer_norm": True}),
    "bloom": ("bloom", _BLOOM),
    "bloom-three-heads": ("bloom", _BLOOM | {"hidden_size": 96, "n_head": 3, "tie_word_embeddings": False}),
    "bloom-residual-from-norm": ("bloom", _BLOOM | {"apply_residual_connection_post_layernorm": True}),
    "gemma2": ("gemma2", _GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "gemma2-uncapped": (
        "gemma2",
        _GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    ),
    "gemma3": ("gemma3_text", _GEMMA | {"layer_types": [*_MIXED[1:], _MIXED[0]]}),
    "gemma3-scaled": (
        "gemma3_text",
        _GEMMA
        | {"layer_types": _MIXED, "final_logit_softcapping": 4.0}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            }
        },
    ),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3-partial-window": (
        "phi3",
        {"sliding_window": 6} | _rope("default", partial_rotary_factor=0.5),
    ),
    "phi3-long": (
        "phi3",
        {"original_max_position_embeddings": 12}
        | _rope("longrope", partial_rotary_factor=0.5, original_max_position_embeddings=12, **_LONG),
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral-window": (
        "mixtral",
        {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 6, "tie_word_embeddings": True},
    ),
    "qwen3-moe": ("qwen3_moe", _QWEN_MOE | {"norm_topk_prob": True}),
    "qwen3-moe-mixed": (
        "qwen3_moe",
        _QWEN_MOE | {"mlp_only_layers": [0], "decoder_sparse_step": 2, "attention_bias": True},
    ),
}  # fmt: skip


def transformers_model(name: str) -> nn.Module:
    """In float32; weights lively enough that a forgotten one shows."""
    model_type, fields = MODELS[name]
    config = transformers.AutoConfig.for_model(model_type, **_SIZES | fields)
    torch.manual_seed(len(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=oracle_attention(config)
        ).eval()
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        spread = 0.3 if parameter.dim() == 1 else 1.5 * parameter.shape[-1] ** -0.5
        parameter.data += spread * torch.randn(parameter.shape, generator=generator)
    return model


@dataclass
class Ours:
    """Our modules of a model, all layers in one stage."""

    decoder: object
    embedding: nn.Module
    layers: list[nn.Module]
    head: nn.Module

    def prefill(
        self, rows: list[list[int]], store: KVStore | None = None, slots: list[int] | None = None, shared: int = 0
    ) -> torch.Tensor:
        """Right-padded rows -> logits [rows, tokens, vocabulary]; their keys and values go to the store's slots, behind
        a prefix of `shared` tokens."""
        longest = max(map(len, rows))
        ids = torch.tensor([row + [3] * (longest - len(row)) for row in rows])
        cache = None if store is None else store.prefill(slots or range(len(rows)), shared, shared)
        at = torch.arange(shared, shared + longest).expand(len(rows), -1)
        step = Step(at, cache, shared + longest, not shared, token_ids=ids)
        if store is not None:
            step.last = torch.tensor([len(row) - 1 for row in rows])
        return self(step)

    def decode(self, tokens: list[int], positions: list[int], store: KVStore, kv_tokens: int) -> torch.Tensor:
        """One token a row, at its own position -> logits [rows, vocabulary]."""
        return self(decode_step(store, 0, tokens, positions, kv_tokens, alike=min(positions) + 1 == kv_tokens))[:, 0]

    @torch.no_grad()
    def __call__(self, step: Step) -> torch.Tensor:
        step.prepare = self.decoder.positions()
        for module in (self.embedding, *self.layers, self.head):
            step = module(step)
        return step.logits

    def store(self, slots: int, capacity: int) -> KVStore:
        spec = self.decoder.spec.attention
        store = KVStore(0, LAYERS, slots * capacity, spec.kv_heads, spec.head_dim, torch.float32, torch.device("cpu"))
        store.shape_for(slots, capacity)
        return store

    def store_behind(self, prefix: list[int], slots: int, capacity: int) -> KVStore:
        """A store that holds the prefix, and what was in its other positions."""
        store = self.store(1, len(prefix) + slots * capacity)
        store.shape_for(1, len(prefix))
        self.prefill([prefix], store)
        store.hold_prefix(len(prefix))
        store.shape_for(slots, capacity)
        return store

    def set_static(self) -> None:
        for layer in self.layers:
            if isinstance(layer.mlp, Experts):
                layer.mlp.static = True


def decode_step(
    store: KVStore, first: int, tokens: list[int], positions: list[int], kv_tokens: int,
    shared: list[int] | None = None, alike: bool = False,
) -> Step:  # fmt: skip
    """One token a row of neighbouring slots, of which `shared` are the prefix's."""
    at, of_prefix = torch.tensor(positions), None if shared is None else torch.tensor(shared)
    cache = store.decode(first, first + len(tokens), at, kv_tokens, of_prefix)
    return Step(at[:, None], cache, kv_tokens, alike, token_ids=torch.tensor(tokens)[:, None], shared=of_prefix)


def our_model(path: Path) -> Ours:
    """From the checkpoint in folder `path`."""
    decoder = Decoder(read_description(path))
    tensors = stored_tensors(path)
    modules = [decoder.embedding(), decoder.head(), *map(decoder.layer, range(LAYERS))]
    names = [decoder.embedding_tensors(), decoder.head_tensors(), *map(decoder.layer_tensors, range(LAYERS))]
    for module, of_module in zip(modules, names, strict=True):
        module.load_state_dict({ours: tensors[theirs] for ours, theirs in of_module.items()}, strict=True)
        module.eval().requires_grad_(False)
    return Ours(decoder, modules[0], modules[2:], modules[1])


@cache
def stored_tensors(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found
