"""In the place of humming, which needs a GPU: the names that we use, their arguments, and the numbers they stand for.

Codes are packed as one stream of bits a row; scales and zeros are turned as humming turns them. Kernels are numbered.
"""

import json
import sys
from dataclasses import asdict, dataclass
from types import ModuleType

import torch


def pack_weight(inputs, num_bits, outputs=None):
    """int32 codes [out, in] -> int32 [out, in x bits / 32]."""
    assert inputs.dtype == torch.int32
    assert inputs.is_contiguous()
    assert inputs.shape[1] % 32 == 0
    bits = inputs[..., None] >> torch.arange(num_bits) & 1
    words = bits.reshape(len(inputs), -1, 32).long() << torch.arange(32)
    return words.sum(-1).to(torch.int32)


def unpack_weight(packed, num_bits):
    bits = packed[..., None] >> torch.arange(32) & 1
    codes = bits.reshape(len(packed), -1, num_bits) << torch.arange(num_bits)
    return codes.sum(-1)


@dataclass
class HummingWeightSchema:
    b_dtype: str
    weight_scale_group_size: int
    has_zero_point: bool
    is_fp_zero_point: bool


@dataclass
class LayerConfig:
    shape_n: int
    shape_k: int
    b_dtype: str
    group: int

    def to_str(self):
        return json.dumps(asdict(self))


def prepare_layer_config(shape_n, shape_k, weight_schema, torch_dtype=None, device=None):
    assert weight_schema.has_zero_point
    assert weight_schema.is_fp_zero_point
    return LayerConfig(shape_n, shape_k, weight_schema.b_dtype, weight_schema.weight_scale_group_size)


def get_heuristics_config(layer_config, shape_m=None, device=None):
    return {"block_shape": (shape_m, 128, 64)}


class HummingKernel:
    kernels = []  # noqa: RUF012
    prepared = {}  # noqa: RUF012

    @classmethod
    def prepare_kernels(cls, layer_config, compute_config=None, tuning_config=None, device=None):
        if layer_config not in cls.prepared:
            found = []
            for low, high, _ in tuning_config:
                cls.kernels.append(json.loads(layer_config))
                found += [low, high, len(cls.kernels) - 1, 0]
            cls.prepared[layer_config] = torch.tensor(found)
        return cls.prepared[layer_config]


class HummingLayer(torch.nn.Module):
    def __init__(self, shape_n, shape_k, weight_config, torch_dtype=None):
        super().__init__()
        self.schema, self.size = weight_config, (shape_n, shape_k)
        self.torch_dtype, bits = torch_dtype, int(weight_config.b_dtype[4:])
        groups = shape_k // weight_config.weight_scale_group_size
        empty = {"weight": torch.empty(shape_n, shape_k * bits // 32, dtype=torch.int32)}
        empty |= {name: torch.empty(shape_n, groups, dtype=torch_dtype) for name in ("weight_scale", "zero_point")}
        for name, tensor in empty.items():
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        self.register_buffer("locks", torch.zeros(2048, dtype=torch.int32))

    def load_from_tensors(self, tensors, prefix=""):
        self.load_state_dict(tensors, strict=False)

    def transform(self):
        self.humming_config = prepare_layer_config(*self.size, self.schema, self.torch_dtype)
        for name in ("weight_scale", "zero_point"):
            turned = getattr(self, name).data.t().contiguous()
            setattr(self, name, torch.nn.Parameter(turned, requires_grad=False))


def launch_kernel(*, configs, inputs, weight, weight_scale, zero_point=None, locks=None):
    rows = len(inputs)
    [kernel] = [number for low, high, number, _ in configs.view(-1, 4).tolist() if low < rows <= high]
    made_for = HummingKernel.kernels[kernel]
    codes = unpack_weight(weight, int(made_for["b_dtype"][4:])).float()
    assert codes.shape == (made_for["shape_n"], made_for["shape_k"])
    assert not locks.any()
    grouped = codes.view(len(codes), -1, made_for["group"])
    full = (grouped - zero_point.float().t()[..., None]) * weight_scale.float().t()[..., None]
    return (inputs.float() @ full.view(codes.shape).t()).to(inputs.dtype)


def install(monkeypatch):
    """Until the test ends, `import humming` finds this."""
    HummingKernel.kernels, HummingKernel.prepared = [], {}
    names = {
        "humming": {},
        "humming.kernel": {},
        "humming.kernel.humming": {"HummingKernel": HummingKernel},
        "humming.layer": {"HummingLayer": HummingLayer},
        "humming.ops": {"launch_kernel": launch_kernel, "pack_weight": pack_weight},
        "humming.schema": {"HummingWeightSchema": HummingWeightSchema},
        "humming.transform": {"prepare_layer_config": prepare_layer_config},
        "humming.tune": {"get_heuristics_config": get_heuristics_config},
    }
    for name, contents in names.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "ds_llmpq.quant.kernels.humming_product", raising=False)
    monkeypatch.delattr("ds_llmpq.quant.kernels.humming_product", raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
