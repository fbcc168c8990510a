"""Reads Hugging Face safetensors checkpoints one tensor at a time, from one file or many shards, which are mapped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from ds_llmpq.errors import UserError
from ds_llmpq.models.decoder import Decoder
from ds_llmpq.models.description import read_description, refuse_foreign
from ds_llmpq.models.index import read_index
from ds_llmpq.models.read_ahead import ReadAhead
from ds_llmpq.models.tying import HEAD, list_embedding_names

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# name in our quantized folders: transformers must not find the tensors, which it cannot interpret
QUANTIZED_INDEX = "quantized.safetensors.index.json"
# base-model prefixes that some checkpoints omit from tensor names
_OPTIONAL_PREFIXES = ("model.", "transformer.")


class Checkpoint:
    """A checkpoint folder. Each tensor is read on request; a shard is mapped only as long as something of it is used.

    `description` is what we read in its config.json, `config` what transformers does. `UserError`: a folder, file,
    shard or tensor is missing or damaged, the model is not supported, or another method has quantized it.
    """

    def __init__(self, path: str | Path, trust_remote_code: bool = False):
        self.path = Path(path)
        refuse_foreign(self.path)  # before transformers looks for the method's library
        self.description = read_description(self.path)  # before transformers, which reads it without bounds
        self.config = _read_config(self.path, trust_remote_code)
        self._shard_of = _locate_tensors(self.path)
        self._ahead: ReadAhead | None = None
        self.config.tie_word_embeddings = self.description.spec.tied

    @cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.description)

    def find_name(self, name: str) -> str:
        """The checkpoint's name for a tensor: with or without the base model's prefix; a tied embedding may be stored
        only as lm_head."""
        if name in self._shard_of:
            return name
        for prefix in _OPTIONAL_PREFIXES:
            if name.startswith(prefix) and name[len(prefix) :] in self._shard_of:
                return name[len(prefix) :]
        tied = self.description.spec.tied and name in list_embedding_names(self.description.family)
        if tied and HEAD in self._shard_of:
            return HEAD
        raise UserError(
            f"Checkpoint {self.path} has no tensor {name!r}; it is incomplete or not what its config.json says."
        )

    def tensors(self, names: Iterable[str], copy: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (requested name, tensor in the checkpoint's dtype), shard by shard. It is on the CPU, or where
        `read_ahead` has brought it.

        copy=False: views of the mapped file where they are on the CPU, for those who make their own of them at once.
        Kept, they would keep the file mapped, whose pages count as memory of this process.
        """
        by_shard: dict[str, list[tuple[str, str]]] = {}
        for asked in names:
            stored = self.find_name(asked)
            arrived = self._ahead.take(stored) if self._ahead else None
            if arrived is not None:
                yield asked, self._check_dtype(asked, arrived)
            else:
                by_shard.setdefault(self._shard_of[stored], []).append((asked, stored))
        for shard, wanted in by_shard.items():
            with self._open(shard) as file:
                for asked, stored in wanted:
                    tensor = self._check_dtype(asked, file.get_tensor(stored))
                    yield asked, tensor.clone() if copy else tensor

    def read_ahead(self, prefix: str, device: torch.device) -> None:
        """Begins to read, for `device`, the tensors whose names begin with `prefix`: they will be asked for next."""
        if self._ahead is None:
            self._ahead = ReadAhead(self._view_tensors, device)
        prefixes = (prefix, *(prefix[len(known) :] for known in _OPTIONAL_PREFIXES if prefix.startswith(known)))
        self._ahead.expect([name for name in self._shard_of if name.startswith(prefixes)])

    def end_read_ahead(self) -> None:
        """Everything is loaded: the thread and its buffers go."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    def _view_tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        by_shard: dict[str, list[str]] = {}
        for name in names:
            by_shard.setdefault(self._shard_of[name], []).append(name)
        for shard, wanted in by_shard.items():
            with self._open(shard) as file:
                for name in wanted:
                    yield name, file.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self.find_name(name)
        with self._open(self._shard_of[stored]) as file:
            return tuple(file.get_slice(stored).get_shape())

    def _check_dtype(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        # 8-bit weights need scales that only their own loader knows
        if name.endswith(".weight") and (tensor.itemsize < 2 or not tensor.is_floating_point()):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"Tensor {name!r} of {self.path} is stored as {kind}; give the full-precision checkpoint as model.path."
            )
        return tensor

    def _open(self, shard: str):
        return _open_shard(self.path / shard)


def _read_config(path: Path, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types
        raise UserError(f"{path / 'config.json'} cannot be read as a model configuration: {_shorten(error)}") from None
    return config


def _locate_tensors(path: Path) -> dict[str, str]:
    """Tensor name -> file name within the folder."""
    index = next((path / name for name in (QUANTIZED_INDEX, _INDEX) if (path / name).is_file()), None)
    if index is not None:
        shard_of = read_index(index)
        for shard in set(shard_of.values()):
            if not (path / shard).is_file():
                raise UserError(f"Shard {path / shard} is missing; the index names it. Fetch the checkpoint again.")
        return shard_of
    if (path / _SINGLE).is_file():
        with _open_shard(path / _SINGLE) as file:
            return dict.fromkeys(file.keys(), _SINGLE)
    raise UserError(f"{path} holds neither {_SINGLE} nor {_INDEX}; only safetensors checkpoints are read.")


@contextmanager
def _open_shard(path: Path):
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"Shard {path} is damaged or unreadable ({_shorten(error)}); fetch it again.") from None


def _shorten(error: Exception) -> str:
    """The first sentence of an exception's message on one line, or its type."""
    return " ".join(str(error).split()).split(". ")[0][:300] or type(error).__name__


def fill(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Replaces the module's parameters of these names (the module may be on `meta`). `UserError`: a tensor does not
    have the shape that the configuration says."""
    for name, tensor in tensors.items():
        check_shape(name, tensor, module.get_parameter(name).shape)
    module.load_state_dict(tensors, strict=False, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """`UserError` if a checkpoint's tensor does not have the `shape` that follows from its config.json."""
    if tensor.shape != shape:
        raise UserError(
            f"Tensor {name!r} has shape {tuple(tensor.shape)} instead of {tuple(shape)}: the weights are not those "
            "that config.json describes; fetch the checkpoint again."
        )
