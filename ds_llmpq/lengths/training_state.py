"""Saves the state of a training after each epoch, so that a killed one resumes; on CPU bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Le, Lt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ds_llmpq.errors import UserError
from ds_llmpq.files import parse_json
from ds_llmpq.validation import Count, Digest, one_of, validate

FILE_NAME = "progress.safetensors"
_OF_ADAM = {"step", "exp_avg", "exp_avg_sq"}


@dataclass(frozen=True)
class _Pcg64:
    state: Annotated[int, Ge(0), Lt(2**128)]
    inc: Annotated[int, Ge(0), Lt(2**128)]


@dataclass(frozen=True)
class _GeneratorState:
    """Of numpy's default generator, as numpy names it."""

    bit_generator: one_of("PCG64")
    state: _Pcg64
    has_uint32: Annotated[int, Ge(0), Le(1)]
    uinteger: Annotated[int, Ge(0), Lt(2**32)]


@dataclass(frozen=True)
class _About:
    """What stands beside the tensors."""

    identity: Digest
    epochs: Count
    generator: _GeneratorState


class TrainingState:
    """Weights, optimizer, and the state of both random generators, in one file of `folder`.

    `identity` names everything that the training depends on; what another training left is ignored. Without a folder
    nothing is kept.
    """

    def __init__(self, folder: Path | None, identity: dict[str, Any]):
        self._file = None if folder is None else folder / FILE_NAME
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()

    def keep(
        self,
        epochs: int,
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        generator: np.random.Generator,
    ) -> None:
        """After so many epochs; the file is replaced whole."""
        if self._file is None:
            return
        tensors = {
            f"{name}/{key}": value for name, module in modules.items() for key, value in module.state_dict().items()
        }
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{key}": torch.as_tensor(value) for key, value in values.items()}
        tensors["random"] = torch.get_rng_state()
        about = {"identity": self._identity, "epochs": epochs, "generator": generator.bit_generator.state}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._file.with_suffix(".part")
        save_file(
            {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, unfinished,
            {"about": json.dumps(about)},
        )  # fmt: skip
        os.replace(unfinished, self._file)

    def resume(
        self, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, generator: np.random.Generator
    ) -> int:
        """Epochs that are done, everything put back as it was behind them; 0 where nothing of this training is kept."""
        if self._file is None or not self._file.is_file():
            return 0
        try:
            with safe_open(self._file, framework="pt") as file:
                about = validate(_About, parse_json(file.metadata()["about"], "", ""), "", "")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about.identity != self._identity:
                return 0
            self._put_back(tensors, about, modules, optimizer, generator)
        except (SafetensorError, UserError, OSError, ValueError, LookupError, TypeError, RuntimeError):
            return 0  # a file of this training that cannot be used: it begins anew
        return about.epochs

    @staticmethod
    def _put_back(
        tensors: dict[str, torch.Tensor], about: _About, modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer, generator: np.random.Generator,
    ) -> None:  # fmt: skip
        """All or nothing: what does not fit is met before the first change."""
        parameters = dict(enumerate(each for group in optimizer.param_groups for each in group["params"]))
        state: dict[int, dict[str, torch.Tensor]] = {}
        own: dict[str, dict[str, torch.Tensor]] = {name: {} for name in modules}
        for key, value in tensors.items():
            name, _, what = key.partition("/")
            if name == "optimizer":
                index, _, what = what.partition("/")
                state.setdefault(int(index), {})[what] = value
                if value.shape not in (parameters[int(index)].shape, ()):
                    raise ValueError(f"{key} has another shape")
            elif name != "random":
                own[name][what] = value
        for name, module in modules.items():
            if {key: value.shape for key, value in module.state_dict().items()} != {
                key: value.shape for key, value in own[name].items()
            }:
                raise ValueError(f"{name} has other weights")
        if any(set(of_one) != _OF_ADAM for of_one in state.values()):
            raise ValueError("the optimizer is another")
        torch.set_rng_state(tensors["random"])
        generator.bit_generator.state = asdict(about.generator)
        for name, module in modules.items():
            module.load_state_dict(own[name])
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def clear(self) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)
