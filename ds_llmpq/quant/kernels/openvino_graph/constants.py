"""Weights as constants of OpenVINO graphs, and the product with one.

The CPU plugin multiplies packed codes fast if zero points are integers, but HQQ's may be real numbers. Then a product
runs with rounded zeros, and the graph adds a correction: (rounded - zero) x scale of each group, multiplied with the
sum of the group's inputs. The weights are the same. The plugin rounds inputs to 8 bits by groups and sums integers.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy
import openvino
import torch
from openvino import opset13

from ds_llmpq.errors import UserError
from ds_llmpq.models.read_ahead import drop_pages
from ds_llmpq.quant.temp_files import find_temp_folder
from ds_llmpq.quant.unpacked_weight import UnpackedWeight

_TYPES = {2: openvino.Type.u2, 4: openvino.Type.u4, 8: openvino.Type.u8}
_ALIGNMENT = 64
_DROP_SECONDS = 0.05
# inputs rounded with one scale: larger groups are faster and less exact, much faster if a row of weights has one scale
_INPUT_GROUP, _INPUT_GROUP_OF_WHOLE_ROWS = 64, 256


@dataclass(frozen=True)
class Constants:
    """A weight's constants in a mapped file: an unnamed one, or the checkpoint, of which `mapping` then is a view.
    OpenVINO keeps its constants beside the layout that it packs them into. The system can drop the pages of a file, so
    that weights are not held twice."""

    mapping: mmap.mmap | torch.Tensor
    nodes: tuple[openvino.op.Constant, ...]
    in_features: int
    group_size: int = 0  # of an unquantized weight

    @property
    def nbytes(self) -> int:
        return sum(node.get_byte_size() for node in self.nodes)

    def drop_pages(self) -> None:
        """Drops the pages once OpenVINO has packed them; if it reads them again, they come from the file."""
        if isinstance(self.mapping, torch.Tensor):
            drop_pages(self.mapping)
        else:
            self.mapping.madvise(mmap.MADV_DONTNEED)


@contextlib.contextmanager
def drop_pages_meanwhile(weights: Sequence[Constants]) -> Iterator[None]:
    """While OpenVINO packs them one after another: what it has read would count as memory of this process until the
    last one is packed, which is twice the weights."""
    ended = threading.Event()

    def drop() -> None:
        while not ended.wait(_DROP_SECONDS):
            for weight in weights:
                weight.drop_pages()

    thread = threading.Thread(target=drop, name="drop-pages")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for weight in weights:
            weight.drop_pages()


@cache
def core() -> openvino.Core:
    return openvino.Core()


def build_threading_properties() -> dict[str, object]:
    """Properties of a compiled model that replaces torch operations: the same number of threads."""
    threads = torch.get_num_threads()
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 0 if threads == 1 else 1,  # 0: on the calling thread, no thread of its own
        "ENABLE_CPU_PINNING": False,  # it would pin every rank to the same cores
    }


def input_group(group_size: int, in_features: int) -> int:
    """Inputs that are rounded to 8 bits with one scale, if weights are in groups of `group_size`."""
    largest = _INPUT_GROUP_OF_WHOLE_ROWS if group_size == in_features else _INPUT_GROUP
    return math.gcd(group_size, largest)


def hold_quantized(weight: UnpackedWeight, bits: int) -> Constants:
    """Codes in `bits`, rounded zeros, scales, and the correction for rounding the zeros if any was rounded."""
    out_features, in_features = weight.codes.shape
    groups, size = in_features // weight.group_size, weight.group_size
    rounded = weight.rounded_zero
    parts = [_pack(weight.codes, bits), rounded.to(torch.uint8).numpy(), weight.scale.numpy()]
    if not weight.has_whole_zeros:
        parts.append(((rounded - weight.zero) * weight.scale).numpy())
    mapping, (codes, zeros, scales, *correction) = _map_file(parts)
    nodes = (
        constant(codes, [out_features, groups, size], _TYPES[bits]),
        constant(zeros, [out_features, groups, 1], openvino.Type.u8),
        constant(scales, [out_features, groups, 1], openvino.Type.f32),
        *(constant(part, [out_features, groups], openvino.Type.f32) for part in correction),
    )
    return Constants(mapping, nodes, in_features, size)


def hold_plain(weight: torch.Tensor, in_file: bool = False) -> Constants:
    """An unquantized weight [out, in], bfloat16 or float32. `in_file`: it is a view of a mapped file, and stays
    there."""
    narrow = weight.dtype == torch.bfloat16
    plain = weight.contiguous().view(torch.int16 if narrow else torch.float32).numpy()
    mapping, (values,) = (weight, [plain]) if in_file else _map_file([plain])
    kind = openvino.Type.bf16 if narrow else openvino.Type.f32
    return Constants(mapping, (constant(values, list(weight.shape), kind),), weight.shape[1])


def product(inputs: openvino.Node, weight: Constants) -> openvino.Node:
    """inputs [rows, in] -> [rows, out]. For a quantized weight the nodes are 32-bit, and the compiled model's precision
    decides how they run. An unquantized weight keeps its dtype, because OpenVINO would copy a bfloat16 weight in 32
    bits."""
    if not weight.group_size:
        return opset13.matmul(convert(inputs, weight.nodes[0].get_element_type()), weight.nodes[0], False, True)
    inputs, matrix = widen(inputs), opset13.convert(weight.nodes[0], numpy.float32)
    _, zeros, scales, *correction = weight.nodes
    out_features, groups, size = weight.nodes[0].shape
    matrix = opset13.multiply(opset13.subtract(matrix, opset13.convert(zeros, numpy.float32)), scales)
    matrix = opset13.reshape(matrix, opset13.constant(numpy.array([out_features, groups * size])), False)
    outputs = opset13.matmul(inputs, matrix, False, True)
    if not correction:
        return outputs
    grouped = opset13.reshape(inputs, opset13.constant(numpy.array([0, groups, size])), True)
    sums = opset13.reduce_sum(grouped, opset13.constant(numpy.array([2])), False)
    return opset13.add(outputs, opset13.matmul(sums, correction[0], False, True))


def convert(node: openvino.Node, kind: openvino.Type) -> openvino.Node:
    """The node itself if it already has that type."""
    return node if node.get_element_type() == kind else opset13.convert(node, kind)


def widen(node: openvino.Node) -> openvino.Node:
    """In 32 bits."""
    return convert(node, openvino.Type.f32)


def constant(data: numpy.ndarray, shape: list[int], kind: openvino.Type) -> openvino.op.Constant:
    """A constant that shares the memory of `data`, which must live as long as the compiled model."""
    return openvino.op.Constant(openvino.Tensor(data, openvino.Shape(shape), kind), shared_memory=True)


def _pack(codes: torch.Tensor, bits: int) -> numpy.ndarray:
    """Codes [out, in] as bytes, the first of a byte in its lowest bits."""
    if bits == 8:
        return codes.contiguous().view(-1).numpy()
    parts = codes.reshape(-1, 8 // bits)
    packed = parts[:, 0].clone()
    for place in range(1, 8 // bits):
        packed |= parts[:, place] << (bits * place)
    return packed.numpy()


def _map_file(parts: list[numpy.ndarray]) -> tuple[mmap.mmap, list[numpy.ndarray]]:
    places, length = [], 0
    for part in parts:
        places.append(length)
        length += -(-part.nbytes // _ALIGNMENT) * _ALIGNMENT
    try:
        with tempfile.TemporaryFile(dir=find_temp_folder()) as file:
            for place, part in zip(places, parts, strict=True):
                file.seek(place)
                file.write(part.data)
            file.truncate(length)
            file.flush()
            mapping = mmap.mmap(file.fileno(), length, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    except OSError as error:
        raise UserError(
            f"{find_temp_folder()} has no room for {length / 1e6:.0f} MB of packed weights ({error.strerror}); "
            "set TMPDIR to a folder with room, or quant.kernel=dequantize."
        ) from None
    whole = numpy.frombuffer(mapping, numpy.uint8)
    views = [
        whole[place : place + part.nbytes].view(part.dtype) for place, part in zip(places, parts, strict=True)
    ]  # fmt: skip
    return mapping, views
