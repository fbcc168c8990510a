"""Single quantized products by OpenVINO's CPU plugin."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import openvino
import torch
from openvino import opset13

from ds_llmpq.quant.kernels.openvino import PRODUCT_ROWS
from ds_llmpq.quant.kernels.openvino_graph.constants import (
    Constants,
    build_threading_properties,
    core,
    hold_quantized,
    input_group,
    product,
)
from ds_llmpq.quant.unpacked_weight import UnpackedWeight


class OpenVinoProduct:
    """Multiplies inputs [rows, in] with one weight [out, in], which may be stacked from linears of one input."""

    def __init__(self, weight: UnpackedWeight, storage_bits: int, held_bytes: int):
        out_features, self.in_features = weight.codes.shape
        self.out_features = out_features
        self._constants = hold_quantized(weight, storage_bits)
        self._request = _compile(self._constants)
        self._bound: tuple[int, int, int] | None = None
        # a first run packs the weight and allocates buffers, so that freed memory is returned before serving
        self._run(torch.zeros(PRODUCT_ROWS, self.in_features), torch.empty(PRODUCT_ROWS, out_features))
        self._constants.drop_pages()
        self.held_bytes = held_bytes

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[rows, in] of any floating-point dtype -> [rows, out] of the same dtype."""
        rows = inputs.shape[0]
        outputs = inputs.new_empty(rows, self.out_features)
        for start in range(0, rows, PRODUCT_ROWS):
            stop = min(start + PRODUCT_ROWS, rows)
            self._run(inputs[start:stop], outputs[start:stop])
        return outputs

    def _run(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        rows = inputs.shape[0]
        source, target = _buffer("in", rows, self.in_features), _buffer("out", rows, self.out_features)
        self._bind(source, target)
        with _one_thread():
            source.copy_(inputs)
            self._request.infer(share_outputs=True)
            outputs.copy_(target)

    def _bind(self, source: torch.Tensor, target: torch.Tensor) -> None:
        wanted = (source.shape[0], source.data_ptr(), target.data_ptr())
        if wanted != self._bound:
            self._request.set_input_tensor(openvino.Tensor(source.numpy(), shared_memory=True))
            self._request.set_output_tensor(openvino.Tensor(target.numpy(), shared_memory=True))
            self._bound = wanted


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Limits torch to one thread, because OpenVINO's threads stay awake after a product, and would compete with torch's
    for the cores."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_buffers: dict[str, torch.Tensor] = {}


def _buffer(name: str, rows: int, features: int) -> torch.Tensor:
    """A float32 view [rows, features] of the buffer that all products of this process share."""
    held = _buffers.get(name)
    if held is None or held.numel() < rows * features:
        with torch.inference_mode(False):  # else it could not be written outside that mode
            held = _buffers[name] = torch.empty(PRODUCT_ROWS * features)
    return held[: rows * features].view(rows, features)


def _compile(weight: Constants) -> openvino.InferRequest:
    inputs = opset13.parameter([-1, weight.in_features], openvino.Type.f32)
    model = openvino.Model([opset13.result(product(inputs, weight))], [inputs])
    properties = build_threading_properties() | {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(input_group(weight.group_size, weight.in_features)),
    }
    return core().compile_model(model, "CPU", properties).create_infer_request()
