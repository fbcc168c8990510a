"""Putting a checkpoint's tensors into modules."""

from __future__ import annotations

import torch
from torch import nn

from ds_llmpq.errors import UserError


def fill(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Puts `tensors` in the place of the module's parameters of those names (the module may be on `meta`).

    `UserError` for a tensor of another shape than the configuration says.
    """
    for name, tensor in tensors.items():
        check_shape(name, tensor, module.get_parameter(name).shape)
    module.load_state_dict(tensors, strict=False, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """`UserError` if a checkpoint's tensor has not the `shape` that follows from its config.json."""
    if tensor.shape != shape:
        raise UserError(
            f"Tensor {name!r} has shape {tuple(tensor.shape)} instead of {tuple(shape)}: the weights are not those "
            "that config.json describes; fetch the checkpoint again."
        )
