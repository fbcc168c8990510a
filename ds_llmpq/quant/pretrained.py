"""A quantized checkpoint as a plain transformers model, for use outside of the pipeline."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ds_llmpq.errors import UserError
from ds_llmpq.models.checkpoint import fill
from ds_llmpq.quant.kernel_linear import RowBlocks
from ds_llmpq.quant.packing import UNQUANTIZED_BITS
from ds_llmpq.quant.quantized_checkpoint import HEAD, QuantizedCheckpoint
from ds_llmpq.quant.recipe import read_recipe


def load_quantized(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """A `PreTrainedModel` with HQQ linears from a folder that `ds-llmpq quantize` wrote, ready to generate.

    `dtype` is the compute dtype (None: the checkpoint's). Weights are never held unquantized. transformers'
    `from_pretrained` cannot do this: it has one bit width for all layers, and quantizes while loading. `UserError`:
    another kind of folder, or damaged shards.
    """
    recipe = read_recipe(path)
    if recipe is None:
        raise UserError(f"{path} was not written by `ds-llmpq quantize`; load it with transformers.")
    checkpoint, device = QuantizedCheckpoint(path, recipe), torch.device(device)
    config = checkpoint.config
    del config.quantization_config
    dtype = dtype or config.dtype or torch.float32
    own_head = recipe.lm_head_bits < UNQUANTIZED_BITS
    if own_head:
        config.tie_word_embeddings = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    decoder = checkpoint.decoder
    if any(role.expert is not None for index in range(len(recipe.bits)) for role in decoder.spec.linears(index)):
        raise UserError(f"{path} is a mixture of experts, which transformers holds as one tensor: run it in a plan.")
    for index, bits in enumerate(recipe.bits):
        for role in decoder.spec.linears(index) if bits < UNQUANTIZED_BITS else ():
            name = decoder.tensor_name(index, role.name)
            bias = _read_tensor(checkpoint, f"{name}.bias", dtype, device) if role.bias else None
            shape = (role.out_features, role.in_features)
            model.set_submodule(name, checkpoint.linear(name, shape, bias, bits, dtype, device))
    if own_head:
        shape = tuple(model.get_submodule(HEAD).weight.shape)
        model.set_submodule(HEAD, RowBlocks(checkpoint.lm_head(shape, recipe.lm_head_bits, dtype, device)))
    _fill_rest(model, checkpoint, dtype, device, decoder.spec.embedding_scale)
    return model.eval()


def _fill_rest(
    model: PreTrainedModel, checkpoint: QuantizedCheckpoint, dtype: torch.dtype, device: torch.device,
    embedding_scale: float | None,
) -> None:  # fmt: skip
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type == "meta" and name not in tied:
            fill(model, {name: _read_tensor(checkpoint, name, dtype, device)})
    model.tie_weights()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding) and embedding_scale is not None:
            module.embed_scale = torch.tensor(embedding_scale, device=device)  # Gemma's, not in checkpoints
        elif any(buffer.device.type == "meta" for buffer in module.buffers(recurse=False)):
            model.set_submodule(name, _rebuild(module, model).to(device))


def _rebuild(module: nn.Module, model: PreTrainedModel) -> nn.Module:
    """Rebuilds a module to compute buffers that checkpoints lack, such as rotary frequencies."""
    return type(module)(model.config)


def _read_tensor(checkpoint: QuantizedCheckpoint, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return next(tensor for _, tensor in checkpoint.tensors([name])).to(device=device, dtype=dtype)
