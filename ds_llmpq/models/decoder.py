"""The modules of a checkpoint's decoder, and the tensors that fill their parameters."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import nn

from ds_llmpq.models.block import Block
from ds_llmpq.models.ends import Embedding, Head, Positions
from ds_llmpq.models.family import Description
from ds_llmpq.models.spec import LinearRole

HOST = torch.device("cpu")


class Decoder:
    """Builds empty modules on the current device, which the loader sets to `meta`. Tensor names are those of the
    checkpoint, parameter names those of the modules."""

    def __init__(self, description: Description):
        self.family, self.spec = description.family, description.spec

    def embedding(self) -> Embedding:
        return Embedding(self.spec)

    def layer(self, index: int) -> Block:
        return Block(self.spec, index)

    def head(self) -> Head:
        return Head(self.spec)

    def positions(self, device: torch.device = HOST) -> Positions:
        """A callable for each `Step` of a stage on `device`."""
        return Positions(self.spec, device)

    def embedding_tensors(self) -> dict[str, str]:
        """Parameter of `embedding()` -> tensor."""
        return self._end_tensors(self._meta_embedding)

    def head_tensors(self) -> dict[str, str]:
        """Parameter of `head()` -> tensor; a tied lm_head uses the tensor of the embedding."""
        return self._end_tensors(self._meta_head)

    def layer_tensors(self, index: int) -> dict[str, str]:
        """Parameter of `layer(index)` -> tensor."""
        return {name: self.tensor_name(index, name) for name, _ in self._on_meta(Block, index).named_parameters()}

    def linears(self, index: int) -> dict[str, LinearRole]:
        """Linears of decoder layer `index` by their checkpoint names without the layer's prefix."""
        return {self.family.rename(linear.name): linear for linear in self.spec.linears(index)}

    def layer_prefix(self, index: int) -> str:
        return f"{self.family.layers}.{index}."

    def tensor_name(self, index: int, name: str) -> str:
        """The checkpoint's name for `name` in decoder layer `index`."""
        return self.layer_prefix(index) + self.family.rename(name)

    def _end_tensors(self, module: nn.Module) -> dict[str, str]:
        names = {}
        for name, _ in module.named_parameters():
            own, _, parameter = name.rpartition(".")
            key = own if own != "norm" else f"{type(module).__name__.lower()}.norm"
            tied = own == "lm_head" and self.spec.tied
            names[name] = f"{self.family.ends['embed_tokens' if tied else key]}.{parameter}"
        return names

    @cached_property
    def _meta_embedding(self) -> Embedding:
        return self._on_meta(Embedding)

    @cached_property
    def _meta_head(self) -> Head:
        return self._on_meta(Head)

    def _on_meta(self, kind: type[nn.Module], *arguments: int) -> nn.Module:
        with torch.device("meta"):
            return kind(self.spec, *arguments)
