"""Final norm and lm_head behind a stage's graph, as a graph of their own.

torch's threads would multiply as fast, but those of the stage's graph stay awake after each call, and torch's after
each product: the two kinds take turns in every pass and keep the cores from each other.
"""

from __future__ import annotations

import weakref

import numpy
import openvino
import torch
from openvino import opset13
from torch import nn

from ds_llmpq.integers import round_up
from ds_llmpq.models.ends import Head
from ds_llmpq.models.step import Step
from ds_llmpq.quant.kernels.openvino import PRODUCT_ROWS
from ds_llmpq.quant.kernels.openvino_graph.constants import (
    Constants,
    build_threading_properties,
    core,
    hold_plain,
    input_group,
    product,
    widen,
)
from ds_llmpq.quant.kernels.openvino_graph.decoder_layer import build_norm
from ds_llmpq.quant.kernels.openvino_graph.tensors import KINDS, share


class HeadGraph(nn.Module):
    """In the place of a filled `Head` that projects nothing and caps nothing. `weight`: its quantized lm_head; None: it
    has an unquantized one. `held_bytes`: of `weight`, and of buffers. Logits are float32, as choosing a token takes
    them. Runs `PRODUCT_ROWS` rows a call, which bounds its buffers."""

    joins_steps = True

    def __init__(self, head: Head, dtype: torch.dtype, weight: Constants | None = None, held_bytes: int = 0):
        super().__init__()
        constants = weight or hold_plain(head.lm_head.weight.data)
        self.vocabulary, self.hidden = constants.nodes[0].shape[0], constants.in_features
        self.dtype = dtype
        self.held_bytes = held_bytes + sum(each.nbytes for each in head.parameters() if each.device.type != "meta")
        kind = KINDS[self.dtype]
        inputs = opset13.parameter([-1, self.hidden], kind.ours)
        states = widen(inputs) if head.norm is None else build_norm(widen(inputs), head.norm)
        model = openvino.Model([opset13.result(widen(product(states, constants)))], [inputs])
        properties = build_threading_properties() | {"INFERENCE_PRECISION_HINT": kind.theirs}
        if weight is not None:  # quantized products run alone in 32 bits, so that logits are not rounded
            group = input_group(weight.group_size, weight.in_features)
            properties |= {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group)}
        self._request = core().compile_model(model, "CPU", properties).create_infer_request()
        self._memory = _LogitMemory(self.vocabulary)
        self._run(torch.zeros(PRODUCT_ROWS, self.hidden, dtype=self.dtype))  # packs the weight
        constants.drop_pages()
        self._constants = constants

    def forward(self, step: Step | list[Step]) -> Step | list[Step]:
        """Also of several steps in the same calls."""
        steps = step if isinstance(step, list) else [step]
        hidden = [each.at_last() for each in steps]
        rows = [each.reshape(-1, self.hidden) for each in hidden]
        together = rows[0] if len(rows) == 1 else torch.cat(rows)
        logits = self._run(together)
        for each, states, part in zip(steps, hidden, logits.split([len(part) for part in rows]), strict=True):
            each.logits = part.view(*states.shape[:-1], self.vocabulary)
        return step

    def _run(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden, logits = hidden.contiguous(), self._memory.lend(len(hidden))
        for inputs, outputs in zip(hidden.split(PRODUCT_ROWS), logits.split(PRODUCT_ROWS), strict=True):
            self._request.set_input_tensor(share(inputs))
            self._request.set_output_tensor(share(outputs))
            self._request.infer(share_outputs=True)
        return logits


class _LogitMemory:
    """What logits are written to, for one tensor at a time. Allocated anew for each call, of another number of rows
    each, they would leave holes in the heap that the next ones do not fit in."""

    def __init__(self, vocabulary: int):
        self._rows = numpy.empty((0, vocabulary), numpy.float32)
        self._lent: weakref.ref[numpy.ndarray] | None = None

    def lend(self, rows: int) -> torch.Tensor:
        """Float32 [rows, vocabulary]; while that is in use, others get memory of their own."""
        if self._lent is not None and self._lent() is not None:
            return torch.empty(rows, self._rows.shape[1])
        if len(self._rows) < rows:
            self._rows = numpy.empty((round_up(rows, PRODUCT_ROWS), self._rows.shape[1]), numpy.float32)
        lent = self._rows[:rows]
        self._lent = weakref.ref(lent)  # the tensor holds it, and so do tensors that are parts of it
        return torch.from_numpy(lent)
