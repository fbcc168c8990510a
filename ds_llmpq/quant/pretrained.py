"""A quantized checkpoint as a plain transformers model, for everything that is not the pipeline."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ds_llmpq.errors import UserError
from ds_llmpq.models import attention
from ds_llmpq.models.architecture import architecture_of, fill
from ds_llmpq.quant.checkpoint import HEAD, QuantizedCheckpoint, read_recipe
from ds_llmpq.quant.convert import RowBlocks
from ds_llmpq.quant.hqq import linear_names
from ds_llmpq.quant.packing import UNQUANTIZED_BITS


def load_quantized(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """The `PreTrainedModel` of a folder that `ds-llmpq quantize` wrote, its linears HQQ layers, ready to generate.

    `dtype` is the compute type (None: the checkpoint's). Weights are never held unquantized. transformers'
    `from_pretrained` cannot do this: its HQQ support knows one width for all layers and quantizes while loading.
    Raises `UserError` for a folder of another kind and for damaged shards.
    """
    recipe = read_recipe(path)
    if recipe is None:
        raise UserError(f"{path} was not written by `ds-llmpq quantize`; load it with transformers.")
    checkpoint, device = QuantizedCheckpoint(path, recipe), torch.device(device)
    config = checkpoint.config
    del config.quantization_config
    attention.leave_to_transformers(config)  # ours is for the pipeline's layers
    dtype = dtype or config.dtype or torch.float32
    own_head = recipe.head_bits < UNQUANTIZED_BITS
    if own_head:
        config.tie_word_embeddings = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    architecture = architecture_of(config)
    for index, bits in enumerate(recipe.bits):
        prefix = architecture.layer_prefix(index)
        layer = model.get_submodule(prefix.rstrip("."))
        for name in linear_names(layer) if bits < UNQUANTIZED_BITS else ():
            linear = layer.get_submodule(name)
            bias = None if linear.bias is None else _tensor(checkpoint, f"{prefix}{name}.bias", dtype, device)
            shape = (linear.out_features, linear.in_features)
            layer.set_submodule(name, checkpoint.linear(prefix + name, shape, bias, bits, dtype, device))
    if own_head:
        shape = tuple(model.get_submodule(HEAD).weight.shape)
        model.set_submodule(HEAD, RowBlocks(checkpoint.output_matrix(shape, recipe.head_bits, dtype, device)))
    _fill_rest(model, checkpoint, dtype, device)
    return model.eval()


def _fill_rest(model: PreTrainedModel, checkpoint: QuantizedCheckpoint, dtype: torch.dtype, device: torch.device):
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type == "meta" and name not in tied:
            fill(model, {name: _tensor(checkpoint, name, dtype, device)})
    model.tie_weights()
    for name, module in list(model.named_modules()):
        if any(buffer.device.type == "meta" for buffer in module.buffers(recurse=False)):
            model.set_submodule(name, _rebuilt(module, model).to(device))


def _rebuilt(module: nn.Module, model: PreTrainedModel) -> nn.Module:
    """Buffers that no checkpoint holds (rotary frequencies) are computed when a module is built."""
    return type(module)(model.config)


def _tensor(checkpoint: QuantizedCheckpoint, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return next(tensor for _, tensor in checkpoint.tensors([name])).to(device=device, dtype=dtype)
