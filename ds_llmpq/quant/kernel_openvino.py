"""Quantized products by OpenVINO's CPU plugin: packed codes, activations rounded to 8 bits a group, integer sums.

Its fast path wants integer zero points, HQQ's are real numbers. So it runs with the zero rounded, and what rounding
left out, (rounded - zero) x scale for each group, is multiplied with the group's sum of inputs and added, all in one
graph: the same weights.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import tempfile
from collections.abc import Iterator
from functools import cache

import numpy
import openvino
import torch
from openvino import opset13

from ds_llmpq.errors import UserError
from ds_llmpq.quant.kernels import KERNELS, OPENVINO_ROWS, held_bytes
from ds_llmpq.quant.unpacked import Unpacked

_TYPES = {2: openvino.Type.u2, 4: openvino.Type.u4, 8: openvino.Type.u8}
_ALIGNMENT = 64
# Inputs that are rounded with one scale. Larger groups are faster and less exact; much faster where a row of weights
# has but one scale itself.
_INPUT_GROUP, _INPUT_GROUP_OF_WHOLE_ROWS = 64, 256


class OpenVinoLinear:
    """Multiplies inputs [rows, in] with one weight [out, in]; several linears of one input are one weight, stacked."""

    def __init__(self, weight: Unpacked, bits: int):
        out_features, self.in_features = weight.codes.shape
        self.out_features = out_features
        self.carried = KERNELS["openvino"].carried[bits]
        self._request, self._mapping = _compiled(weight, self.carried)
        self._bound: tuple[int, int, int] | None = None
        # packs the weight and takes all buffers, so that what this frees can be given back before serving
        self._run(torch.zeros(OPENVINO_ROWS, self.in_features), torch.empty(OPENVINO_ROWS, out_features))
        # OpenVINO has its own layout now; should it ever ask again, the pages come back from the file
        self._mapping.madvise(mmap.MADV_DONTNEED)
        self.held_bytes = held_bytes("openvino", out_features, self.in_features, bits, weight.group_size, 0)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[rows, in] of any floating type -> [rows, out] of the same."""
        rows = inputs.shape[0]
        outputs = inputs.new_empty(rows, self.out_features)
        for start in range(0, rows, OPENVINO_ROWS):
            stop = min(start + OPENVINO_ROWS, rows)
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
    """OpenVINO's threads stay awake for a while after a product; torch's, for the little that is around it, would
    compete with them for the cores."""
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
    """A float32 view [rows, features] of the one buffer that all products of this process share."""
    held = _buffers.get(name)
    if held is None or held.numel() < rows * features:
        with torch.inference_mode(False):  # else it could not be written outside of that mode
            held = _buffers[name] = torch.empty(OPENVINO_ROWS * features)
    return held[: rows * features].view(rows, features)


@cache
def _core() -> openvino.Core:
    return openvino.Core()


def _compiled(weight: Unpacked, bits: int) -> tuple[openvino.InferRequest, mmap.mmap]:
    out_features, in_features = weight.codes.shape
    groups, size = in_features // weight.group_size, weight.group_size
    rounded = weight.zero.round().clamp_(0, 255)
    left_out = (rounded - weight.zero) * weight.scale
    parts = [_packed(weight.codes, bits), rounded.to(torch.uint8).numpy(), weight.scale.numpy(), left_out.numpy()]
    mapping, (codes, zeros, scales, left_out) = _file_backed(parts)
    per_group = [out_features, groups, 1]
    inputs = opset13.parameter([-1, in_features], openvino.Type.f32)
    matrix = opset13.convert(_constant(codes, [out_features, groups, size], _TYPES[bits]), numpy.float32)
    offset = opset13.convert(_constant(zeros, per_group, openvino.Type.u8), numpy.float32)
    matrix = opset13.multiply(opset13.subtract(matrix, offset), _constant(scales, per_group, openvino.Type.f32))
    matrix = opset13.reshape(matrix, opset13.constant(numpy.array([out_features, in_features])), False)
    product = opset13.matmul(inputs, matrix, False, True)
    grouped = opset13.reshape(inputs, opset13.constant(numpy.array([0, groups, size])), True)
    sums = opset13.reduce_sum(grouped, opset13.constant(numpy.array([2])), False)
    left_out = _constant(left_out, [out_features, groups], openvino.Type.f32)
    product = opset13.add(product, opset13.matmul(sums, left_out, False, True))
    model = openvino.Model([opset13.result(product)], [inputs])
    return _core().compile_model(model, "CPU", _properties(size, in_features)).create_infer_request(), mapping


def _properties(group_size: int, in_features: int) -> dict[str, object]:
    threads = torch.get_num_threads()
    largest = _INPUT_GROUP_OF_WHOLE_ROWS if group_size == in_features else _INPUT_GROUP
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 0 if threads == 1 else 1,  # 0: on the calling thread, no thread of its own
        "ENABLE_CPU_PINNING": False,  # it would pin every rank to the same cores
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(math.gcd(group_size, largest)),
    }


def _constant(data: numpy.ndarray, shape: list[int], kind: openvino.Type) -> openvino.op.Constant:
    return openvino.op.Constant(openvino.Tensor(data, openvino.Shape(shape), kind), shared_memory=True)


def _packed(codes: torch.Tensor, bits: int) -> numpy.ndarray:
    """Codes [out, in] as bytes, the first of a byte in its lowest bits."""
    if bits == 8:
        return codes.contiguous().view(-1).numpy()
    parts = codes.reshape(-1, 8 // bits)
    packed = parts[:, 0].clone()
    for place in range(1, 8 // bits):
        packed |= parts[:, place] << (bits * place)
    return packed.numpy()


def _file_backed(parts: list[numpy.ndarray]) -> tuple[mmap.mmap, list[numpy.ndarray]]:
    """The arrays as parts of an unnamed file, mapped. OpenVINO keeps its constants beside the layout that it packs them
    into; of a file's pages the system keeps only what is in use, so that weights are not held twice."""
    places, length = [], 0
    for part in parts:
        places.append(length)
        length += -(-part.nbytes // _ALIGNMENT) * _ALIGNMENT
    try:
        with tempfile.TemporaryFile() as file:
            for place, part in zip(places, parts, strict=True):
                file.seek(place)
                file.write(part.data)
            file.truncate(length)
            file.flush()
            mapping = mmap.mmap(file.fileno(), length, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    except OSError as error:
        raise UserError(
            f"{tempfile.gettempdir()} has no room for {length / 1e6:.0f} MB of packed weights ({error.strerror}); "
            "set TMPDIR to a folder with room, or quant.kernel=dequantize."
        ) from None
    whole = numpy.frombuffer(mapping, numpy.uint8)
    views = [
        whole[place : place + part.nbytes].view(part.dtype) for place, part in zip(places, parts, strict=True)
    ]  # fmt: skip
    return mapping, views
