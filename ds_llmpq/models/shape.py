"""The shape of a decoder-only model, read from its Hugging Face config.json: sizes, linear layers, parameter counts.

Everything that plans needs to know about a model is here; no weights, no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ds_llmpq.errors import UserError
from ds_llmpq.files import check_files, read_json
from ds_llmpq.models.tying import stores_own_head
from ds_llmpq.validation import Plain, checked


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
        from ds_llmpq.models.shape_readers import read

        return read(config)

    @property
    def linear_weights(self) -> int:
        """Weights of one decoder layer that can be quantized."""
        return sum(linear.weights for linear in self.linears)

    @property
    def active_linear_weights(self) -> float:
        """Weights of one decoder layer that work on a token; all of them but in a mixture of experts."""
        return sum(linear.active_weights for linear in self.linears)

    @property
    def has_experts(self) -> bool:
        return any(".experts." in linear.name for linear in self.linears)

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
