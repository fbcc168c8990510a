"""Phi-3: Mistral with one linear for queries, keys and values, and one for gate and up. Perhaps only part of a head is
rotated, and long sequences have other angles."""

from __future__ import annotations

from dataclasses import dataclass

from ds_llmpq.models.families import llama
from ds_llmpq.models.family import Epsilon, Family, Positive
from ds_llmpq.models.rope_keys import read_rotary
from ds_llmpq.models.spec import DecoderSpec, RotarySpec


@dataclass(frozen=True, kw_only=True)
class _Phi3Keys(llama.WindowedKeys):
    rms_norm_eps: Epsilon = 1e-5
    max_position_embeddings: Positive = 4096
    original_max_position_embeddings: Positive = 4096

    def rotary(self) -> RotarySpec:
        given = dict(self.rope_scaling or self.rope_parameters or {})
        if given.get("rope_type", given.get("type", "default")) != "default":
            # the only scaling of this family, which had other names
            given |= {
                "rope_type": "longrope",
                "original_max_position_embeddings": self.original_max_position_embeddings,
            }
        defaults = {"rope_theta": self.rope_theta, "partial_rotary_factor": self.partial_rotary_factor}
        return read_rotary(given, self.head_size, self.max_position_embeddings, defaults)


def _build(keys: _Phi3Keys) -> DecoderSpec:
    attention = llama.attention(keys, qkv="stacked")
    return llama.decoder(keys, attention=attention, layers=llama.layers(keys, llama.mlp(keys, stacked=True)))


FAMILIES = {"phi3": Family(_Phi3Keys, _build, "model.layers", llama.ENDS, llama.NAMES, eos_token_id=32000)}
