"""Builds one pipeline layer from the checkpoint: structure on `meta`, then its tensors, each quantized on arrival.

A rank loads only its own layers, so its peak memory is its share plus one tensor. Layers of a quantized checkpoint are
used as stored. What is quantized or packed is taken from the mapped file; what stays as it is gets memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from hqq.core.quantize import HQQLinear
from torch import nn

from ds_llmpq.models.block import Block
from ds_llmpq.models.checkpoint import Checkpoint, check_shape, fill
from ds_llmpq.models.decoder import Decoder
from ds_llmpq.models.spec import LinearRole
from ds_llmpq.models.step import Step
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.hqq import quantize_linear, quantize_rows
from ds_llmpq.quant.kernel_linear import build_linears, build_lm_head, explain_missing
from ds_llmpq.quant.kernels.base import Kernel, Show
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.quant.kernels.linears import (
    group_linears,
    list_lm_head_products,
    lm_head_bytes,
    resolve_kernel,
    stack_features,
)
from ds_llmpq.quant.kernels.registry import AUTO, find_kernel
from ds_llmpq.quant.onednn_linear import pack_linears
from ds_llmpq.quant.packing import UNQUANTIZED_BITS, make_groups
from ds_llmpq.quant.quantized_checkpoint import QuantizedCheckpoint
from ds_llmpq.quant.unpacked_weight import stack, unpack


@dataclass
class LayerLoader:
    """Reads pipeline layers of `checkpoint` in `dtype` onto `device`.

    `bits`: bit width of every decoder layer; a quantized checkpoint must have these and `quant`, else `UserError`.
    `quant.kernel` runs quantized linears; an unresolved `auto`
    (`kernels.registry.select_kernel`) means HQQ's own forward. `on_loaded` is called after each layer. `packed`: packs
    unquantized linears for speed (`quant.onednn_linear`), for inference only. `stage`: decoder layers that will run one
    after another, and become one graph if the kernel takes whole stages. `ahead`: decoder layers that will be loaded
    in this order, so that each is read while the one before it is quantized and packed.
    """

    checkpoint: Checkpoint
    bits: list[int]
    quant: QuantConfig
    dtype: torch.dtype
    device: torch.device
    on_loaded: Callable[[str], None] = lambda name: None
    packed: bool = False
    stage: range = range(0)
    ahead: range = range(0)
    _graph: nn.Module | None = None
    _views: set[int] = field(default_factory=set)  # addresses of parameters that are views of a mapped file
    _shared: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.checkpoint, QuantizedCheckpoint):
            self.checkpoint.recipe.check(self.checkpoint.path, self.bits, self.quant)

    @property
    def kernel(self) -> Kernel:
        """The kernel of decoder layers; `dequantize` if it does not support the compute dtype or settings."""
        kernel = DEQUANTIZE if self.quant.kernel == AUTO else find_kernel(self.quant.kernel)
        if kernel.whole_stage and not self.stage:
            kernel = kernel.product_kernel
        dtype = str(self.dtype).removeprefix("torch.")
        reason = kernel.unsupported_reason(self.device.type, dtype, self.quant, self.decoder.spec)
        return DEQUANTIZE if reason else kernel

    @property
    def config(self):
        return self.checkpoint.config

    @cached_property
    def decoder(self) -> Decoder:
        return self.checkpoint.decoder

    def compile_products(self, layers: Iterable[int], with_head: bool, show: Show) -> None:
        """Compiles what the quantized products of decoder layers, and of lm_head, need, where a kernel is compiled.
        `UserError`: its library is missing."""
        kernel, groups = self.kernel, make_groups(self.quant)
        products = [
            (*stack_features(group), self.bits[index])
            for index in layers
            if self.bits[index] < UNQUANTIZED_BITS
            for group in self._group(index)
        ]
        if with_head and (bits := self.quant.lm_head_bits) < UNQUANTIZED_BITS:
            spec = self.decoder.spec
            _, sizes = list_lm_head_products(kernel, spec.vocab, spec.width, bits, groups)
            products += [(*size, bits) for size in sizes]
        wanted = [each for each in products if resolve_kernel(kernel, *each, groups) is kernel]
        if wanted:
            try:
                kernel.compile_products(wanted, self.quant.group_size, self.dtype, show)
            except ImportError as error:
                raise explain_missing(kernel, error) from None

    def embedding(self) -> nn.Module:
        with torch.device("meta"):
            module = self.decoder.embedding()
        names = self.decoder.embedding_tensors()
        self._fill(module, names)
        # a tied head on the same stage shares this tensor
        for parameter, tensor_name in names.items():
            self._shared[tensor_name] = module.get_parameter(parameter)
        return self._finish(module, "embedding")

    def head(self) -> nn.Module:
        with torch.device("meta"):
            module = self.decoder.head()
        names = self.decoder.head_tensors()
        as_graph = self._builds_head_graph()
        weight, held_bytes = None, 0
        if self.quant.lm_head_bits < UNQUANTIZED_BITS:
            shape, name = tuple(module.lm_head.weight.shape), names.pop("lm_head.weight")
            if as_graph:
                weight, held_bytes = self._hold_lm_head(shape, name)
            else:
                module.lm_head = self._build_lm_head(shape, name)
        shared = {local: self._shared[name].data for local, name in names.items() if name in self._shared}
        self._fill(module, {local: name for local, name in names.items() if local not in shared})
        fill(module, shared)
        if shared or not self.packed:  # a tied head is not packed, because that would make a second copy
            return self._finish(module, "head")
        if as_graph:
            held_bytes += self.kernel.head_buffer_bytes(self.decoder.spec.vocab, self.quant.lm_head_bits)
            module = self.kernel.build_head(module, self.dtype, weight, held_bytes)
        return self._finish(module, "head", packed=True)

    def decoder_layer(self, index: int) -> nn.Module:
        if index + 1 in self.ahead:
            self.checkpoint.read_ahead(self.decoder.layer_prefix(index + 1), self.device)
        layer = self._build_layer(index)
        if index == self.ahead.stop - 1:
            self.checkpoint.end_read_ahead()
        return layer

    def _build_layer(self, index: int) -> nn.Module:
        with torch.device("meta"):
            module = self.decoder.layer(index)
        if self.kernel.whole_stage:
            return self._finish(self._add_to_stage(module, index), f"layer {index}")
        if self.bits[index] < UNQUANTIZED_BITS:
            self._quantize_all(module, index)
        self._fill_layer(module, index)
        return self._finish(module, f"layer {index}", packed=self.packed)

    def _fill(self, module: nn.Module, names: dict[str, str]) -> None:
        local = {tensor: parameter for parameter, tensor in names.items()}
        for tensor_name, tensor in self.checkpoint.tensors(list(local), copy=False):
            converted = self._convert(tensor)
            self._note_view(tensor, converted)
            fill(module, {local[tensor_name]: converted})

    def _fill_layer(self, layer: Block, index: int, but: set[str] = frozenset()) -> None:
        """Fills parameters that are still empty, except those in `but`."""
        empty = [name for name, parameter in layer.named_parameters() if parameter.device.type == "meta"]
        self._fill(layer, {name: self.decoder.tensor_name(index, name) for name in empty if name not in but})

    def _add_to_stage(self, layer: Block, index: int) -> nn.Module:
        """Adds the layer to its stage's graph; returns the graph for the last layer of the stage."""
        if index == self.stage.start:
            self.kernel.check_stage(self.dtype)
            self._graph = self.kernel.open_stage(index, self.dtype, self.quant.kv_bits)
        weights = self._hold_weights(index)
        self._fill_layer(layer, index, but={f"{name}.weight" for names in weights for name in names})
        self._graph.add(layer, weights)
        if index < self.stage.stop - 1:
            return StageMember()
        self._graph.compile()
        return self._graph

    def _hold_weights(self, index: int) -> dict[tuple[str, ...], object]:
        """The weights of a layer's linears as the stage's graph takes them, by the names of linears that run as one."""
        bits, found = self.bits[index], {}
        for roles in self._group(index):
            if bits < UNQUANTIZED_BITS:
                weight = stack([unpack(self._quantize(index, role, torch.float32, copy=False)) for role in roles])
            else:
                weight = self._read_weights(index, roles)
            in_file = isinstance(weight, torch.Tensor) and weight.data_ptr() in self._views
            found[tuple(role.name for role in roles)] = self.kernel.hold(weight, bits, in_file)
        return found

    def _read_weights(self, index: int, roles: list[LinearRole]) -> torch.Tensor:
        """Unquantized weights of one input, outputs in order: a view of the file if it is a single one."""
        weights = [self._read_weight(index, role) for role in roles]
        converted = [self._convert(weight) for weight in weights]
        if len(weights) > 1:
            return torch.cat(converted)
        self._note_view(weights[0], converted[0])
        return converted[0]

    def _group(self, index: int) -> list[list[LinearRole]]:
        """The linears of a decoder layer in the groups in which the kernel runs them."""
        return group_linears(self.kernel, self.decoder.spec.linears(index), self.bits[index], make_groups(self.quant))

    def _quantize_all(self, layer: Block, index: int) -> None:
        kernel, groups, bits = self.kernel, make_groups(self.quant), self.bits[index]
        for group in self._group(index):
            by_kernel = resolve_kernel(kernel, *stack_features(group), bits, groups) is not DEQUANTIZE
            # the kernel gets scales and zeros in the precision in which they are stored
            dtype = torch.float32 if by_kernel else self.dtype
            quantized = [self._quantize(index, role, dtype, copy=not by_kernel) for role in group]
            modules = build_linears(kernel, quantized, bits, groups, self.dtype)
            for role, module in zip(group, modules, strict=True):
                layer.set_submodule(role.name, module)

    def _quantize(self, index: int, role: LinearRole, dtype: torch.dtype, copy: bool) -> HQQLinear:
        """copy=False: for a kernel, which makes its own of it at once."""
        path, bits = self.decoder.tensor_name(index, role.name), self.bits[index]
        bias = self._convert(self._read_tensor(f"{path}.bias", copy=True)) if role.bias else None
        if isinstance(self.checkpoint, QuantizedCheckpoint):
            shape = (role.out_features, role.in_features)
            return self.checkpoint.linear(path, shape, bias, bits, dtype, self.device, copy)
        return quantize_linear(self._read_weight(index, role), bias, bits, self.quant, dtype, self.device)

    def _builds_head_graph(self) -> bool:
        """Whether norm and lm_head run as a graph, as far as can be said before they are filled."""
        return self.packed and self.kernel.takes_head(self.decoder.spec, self.quant.lm_head_bits)

    def _runs_lm_head(self, shape: tuple[int, int]) -> bool:
        """Whether a kernel multiplies with a quantized lm_head, not HQQ's own forward."""
        found, _ = list_lm_head_products(self.kernel, *shape, self.quant.lm_head_bits, make_groups(self.quant))
        return found is not DEQUANTIZE

    def _hold_lm_head(self, shape: tuple[int, int], name: str) -> tuple[object, int]:
        """A quantized lm_head as its graph takes it, and its bytes."""
        bits, weight = self.quant.lm_head_bits, stack([unpack(block) for block in self._quantize_lm_head(shape, name)])
        held = lm_head_bytes(self.kernel, *shape, bits, make_groups(self.quant), self.dtype.itemsize)
        return self.kernel.hold(weight, bits), held

    def _build_lm_head(self, shape: tuple[int, int], name: str) -> nn.Module:
        blocks = self._quantize_lm_head(shape, name)
        return build_lm_head(self.kernel, blocks, self.quant.lm_head_bits, make_groups(self.quant), self.dtype)

    def _quantize_lm_head(self, shape: tuple[int, int], name: str) -> list[HQQLinear]:
        """A quantized lm_head of `shape` [vocabulary, features] from the tensor `name`, in blocks of rows."""
        bits, by_kernel = self.quant.lm_head_bits, self._runs_lm_head(shape)
        dtype = torch.float32 if by_kernel else self.dtype
        if isinstance(self.checkpoint, QuantizedCheckpoint):
            return self.checkpoint.lm_head(shape, bits, dtype, self.device, copy=not by_kernel)
        weight = self._read_tensor(name)
        check_shape(name, weight, shape)
        return quantize_rows(weight, bits, self.quant, dtype, self.device)

    def _read_weight(self, index: int, role: LinearRole) -> torch.Tensor:
        name = self.decoder.tensor_name(index, role.name) + ".weight"
        weight = self._read_tensor(name)
        check_shape(name, weight, (role.out_features, role.in_features))
        return weight

    def _read_tensor(self, name: str, copy: bool = False) -> torch.Tensor:
        return next(tensor for _, tensor in self.checkpoint.tensors([name], copy))

    def _convert(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=self.device, dtype=self.dtype)

    def _note_view(self, read: torch.Tensor, converted: torch.Tensor) -> None:
        if converted is read and read.device.type == "cpu":
            self._views.add(read.data_ptr())

    def _finish(self, module: nn.Module, name: str, packed: bool = False) -> nn.Module:
        module.eval()
        if packed:
            pack_linears(module)
        for parameter in module.parameters():
            if parameter.data_ptr() in self._views:
                parameter.data = parameter.data.clone()
        self._views.clear()
        self.on_loaded(name)
        return module


class StageMember(nn.Module):
    """Placeholder for a layer that runs in its stage's graph, which is in the place of the last layer."""

    def forward(self, step: Step) -> Step:
        return step
