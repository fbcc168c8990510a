"""Saves the state of a training after each epoch, so that a killed one resumes; on CPU bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

FILE_NAME = "progress.safetensors"


class TrainingState:
    """Weights, optimizer, and both random generators, in one file of `folder`; without a folder nothing is kept.

    `identity` names everything the training depends on. A file that another training left, or that was changed since,
    has another digest and is ignored.
    """

    def __init__(self, folder: Path | None, identity: dict[str, Any]):
        self._file = None if folder is None else folder / FILE_NAME
        self._identity = json.dumps(identity, sort_keys=True, default=str)

    def keep(
        self,
        epochs: int,
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        generator: np.random.Generator,
    ) -> None:
        """Saves the state after so many epochs; the file is replaced whole."""
        if self._file is None:
            return
        groups = {name: module.state_dict() for name, module in modules.items()}
        groups |= {f"optimizer/{index}": values for index, values in optimizer.state_dict()["state"].items()}
        groups["random"] = {"state": torch.get_rng_state()}
        tensors = {
            f"{name}/{key}": torch.as_tensor(value).detach().clone().contiguous()
            for name, values in groups.items()
            for key, value in values.items()
        }
        about = json.dumps({"epochs": epochs, "generator": generator.bit_generator.state})
        self._file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._file.with_suffix(".part")
        save_file(tensors, unfinished, {"about": about, "digest": self._digest(about, tensors)})
        os.replace(unfinished, self._file)

    def resume(
        self, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, generator: np.random.Generator
    ) -> int:
        """Restores everything as it was. Returns the number of epochs done, 0 if nothing of this training is kept."""
        if self._file is None or not self._file.is_file():
            return 0
        try:
            with safe_open(self._file, framework="pt") as file:
                kept, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if kept["digest"] != self._digest(kept["about"], tensors):
                return 0
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError):
            return 0
        about, groups = json.loads(kept["about"]), {}
        for key, value in tensors.items():
            # a module's keys hold dots, no slashes
            name, _, inner = key.rpartition("/")
            groups.setdefault(name, {})[inner] = value
        torch.set_rng_state(groups["random"]["state"])
        generator.bit_generator.state = about["generator"]
        for name, module in modules.items():
            module.load_state_dict(groups[name])
        steps = {int(name.split("/")[1]): values for name, values in groups.items() if name.startswith("optimizer/")}
        optimizer.load_state_dict({"state": steps, "param_groups": optimizer.state_dict()["param_groups"]})
        return about["epochs"]

    def clear(self) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _digest(self, about: str, tensors: dict[str, torch.Tensor]) -> str:
        digest = hashlib.sha256(f"{self._identity}\n{about}\n".encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
