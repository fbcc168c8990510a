"""Computes a checkpoint layer by layer over calibration rows: only one layer and the hidden states are in memory.

`measure` runs many variants of a model (each a tuple of widths) in one walk over its layers. Variants share the work of
their equal first layers: L x b models that each quantize one layer all share the unquantized beginning.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ds_llmpq.errors import UserError
from ds_llmpq.models.checkpoint import Checkpoint
from ds_llmpq.models.shape import read_shape
from ds_llmpq.models.step import Step
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.layers import LayerLoader
from ds_llmpq.quant.packing import UNQUANTIZED_BITS

Bits = tuple[int, ...]


@dataclass(frozen=True)
class LossIncrease:
    """Compared with the unquantized model, in nats per token: the increase of the loss, and KL(full || variant).
    `loss_error` is the standard error of the mean increase, as if tokens were independent."""

    loss: float
    loss_error: float
    kl: float
    by_row: tuple[float, ...] = ()  # increase of the loss


class Layerwise:
    """`tokens` [rows, length + 1]; computes in float32 on `device`, `rows_at_once` rows a pass."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        quant: QuantConfig,
        tokens: torch.Tensor,
        device: torch.device,
        rows_at_once: int = 4,
    ):
        self.layers = checkpoint.config.num_hidden_layers
        self.inputs, self.targets = tokens[:, :-1].to(device), tokens[:, 1:].to(device)
        self.rows_at_once = rows_at_once
        quant = replace(quant, lm_head_bits=UNQUANTIZED_BITS)
        self._loader = LayerLoader(checkpoint, [UNQUANTIZED_BITS] * self.layers, quant, torch.float32, device)
        self._positional = self._loader.decoder.positions(device)
        _check_length(checkpoint, self.inputs.shape[1])

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] features of a decoder layer's linears by name."""
        return {role.name: (role.out_features, role.in_features) for role in self._loader.decoder.spec.linears(0)}

    @torch.inference_mode()
    def embed(self) -> torch.Tensor:
        """Hidden states [rows, length, hidden] before the first decoder layer."""
        embedding = self._loader.embedding()
        return torch.cat(
            [embedding(self._step(token_ids=rows)).hidden for rows in self.inputs.split(self.rows_at_once)]
        )

    def layer(self, index: int, bits: int = UNQUANTIZED_BITS) -> nn.Module:
        self._loader.bits[index] = bits
        return self._loader.decoder_layer(index)

    def head(self, bits: int = UNQUANTIZED_BITS) -> nn.Module:
        loader = replace(self._loader, quant=replace(self._loader.quant, lm_head_bits=bits))
        return loader.head()

    @torch.inference_mode()
    def run_layer(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.apply(layer, rows) for rows in hidden.split(self.rows_at_once)])

    def apply(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return layer(self._step(hidden=hidden)).hidden

    def compute_logits(self, head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return head(self._step(hidden=hidden)).logits.float()

    def _step(self, token_ids: torch.Tensor | None = None, hidden: torch.Tensor | None = None) -> Step:
        rows, length = (token_ids if hidden is None else hidden).shape[:2]
        return Step(
            positions=torch.arange(length, device=self.inputs.device).expand(rows, length),
            cache=None,
            kv_tokens=length,
            causal_only=True,
            token_ids=token_ids,
            hidden=hidden,
            prepare=self._positional,
        )


def measure(
    model: Layerwise,
    variants: Sequence[Bits],
    on_layer: Callable[[int, int], None] = lambda done, total: None,
    state_bytes: int = 1 << 30,
    heads: Sequence[int] = (),
) -> dict[Bits | int, LossIncrease]:
    """What each variant loses, and what quantizing lm_head alone loses at each width of `heads`. Variants run in groups
    whose hidden states fit in `state_bytes`."""
    full = (UNQUANTIZED_BITS,) * model.layers
    embedded = model.embed()
    at_once = max(1, state_bytes // (2 * embedded.nbytes))  # states before and after a layer
    wanted = sorted({variant for variant in variants if variant != full}, reverse=True)
    groups = [wanted[start : start + at_once] for start in range(0, len(wanted), at_once)]
    found: dict[Bits | int, LossIncrease] = {full: LossIncrease(0.0, 0.0, 0.0)}
    for number, group in enumerate(groups):
        states: dict[Bits, torch.Tensor] = {(): embedded}
        for index in range(model.layers):
            states = _next_states(model, states, [full, *group], index)
            on_layer(number * model.layers + index + 1, len(groups) * model.layers)
        heads_of = dict.fromkeys(states, model.head())
        for width in heads if number == 0 else ():
            states[width], heads_of[width] = states[full], model.head(width)
        found |= _compare(model, states, full, heads_of)
    return {variant: found[variant] for variant in (*variants, *heads)}


def _next_states(model: Layerwise, states: dict[Bits, torch.Tensor], variants: list[Bits], index: int):
    """Hidden states by the widths of the layers so far; equal beginnings are computed once."""
    needed = {variant[: index + 1] for variant in variants}
    following: dict[Bits, torch.Tensor] = {}
    for bits in sorted({prefix[-1] for prefix in needed}, reverse=True):
        layer = model.layer(index, bits)
        for prefix in sorted(needed):
            if prefix[-1] == bits:
                following[prefix] = model.run_layer(layer, states[prefix[:-1]])
    return following


@torch.inference_mode()
def _compare(
    model: Layerwise, states: dict[Bits | int, torch.Tensor], full: Bits, heads: dict[Bits | int, nn.Module]
) -> dict[Bits | int, LossIncrease]:
    """Every variant's last hidden states under its head, against those of `full`."""
    sums: dict[Bits | int, list[torch.Tensor]] = {variant: [] for variant in states}
    for row in range(len(model.inputs)):
        target = model.targets[row]
        reference = model.compute_logits(heads[full], states[full][row : row + 1])[0].log_softmax(-1)
        for variant, hidden in states.items():
            found = model.compute_logits(heads[variant], hidden[row : row + 1])[0].log_softmax(-1)
            increase = F.nll_loss(found, target, reduction="none") - F.nll_loss(reference, target, reduction="none")
            kl = (reference.exp() * (reference - found)).sum(-1)
            sums[variant].append(torch.stack([part.double().mean().cpu() for part in (increase, increase**2, kl)]))
    count = model.targets.numel()
    return {variant: _average(torch.stack(rows), count) for variant, rows in sums.items()}


def _average(rows: torch.Tensor, count: int) -> LossIncrease:
    """`rows` [rows, 3]: means of a row's increase of the loss, its square, and KL; `count` tokens in all."""
    increase, square, kl = rows.mean(0).tolist()
    error = (max(square - increase**2, 0.0) / count) ** 0.5
    return LossIncrease(increase, error, max(kl, 0.0), tuple(rows[:, 0].tolist()))


def _check_length(checkpoint: Checkpoint, length: int) -> None:
    most = read_shape(checkpoint.path).max_positions
    if most is not None and length > most:
        raise UserError(f"Rows of {length} tokens are longer than the model's {most} positions; give shorter rows.")


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held: its tensors on a GPU, else all of it (Linux and macOS)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
