"""Train the small Llama model that the tests use as their real model (`tests/assets/tiny-llama`).

The text is what every Python installation carries: the standard library's own source. Files are listed in sorted
order and held out by a hash of their relative path, so one interpreter version always gives one split. Pairs of
docstring and function, rendered through the chat template and closed by the end-of-turn token, teach the model to
answer a chat and to stop.

    OMP_NUM_THREADS=2 python scripts/train_tiny_model.py tests/assets/tiny-llama
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed
from scripts.tiny_corpus import CONTEXT_TOKENS, encode_items, read_documents, train_tokenizer, windows

QUANTIZED_BITS = (8, 4, 3, 2)
GROUP_SIZE = 64


# --------------------------------------------------------------------------------------------------------- model


def build_model(vocab_size: int, tokenizer, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # residual branches start small, which lets a small model take a high learning rate
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight /= math.sqrt(2 * layers)
            layer.mlp.down_proj.weight /= math.sqrt(2 * layers)
    return model


def token_loss(model, batch: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross entropy in nats of rows [B, T + 1]: token t + 1 from tokens up to t; -100 marks padding."""
    inputs, targets = batch[:, :-1].clamp(min=0), batch[:, 1:]
    logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction=reduction)


def schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then cosine to 2 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_model(model, items, args) -> None:
    """AdamW under bf16 autocast; the last part of the steps uses rows of the full context, at equal tokens a step."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    generator = random.Random(args.seed)
    short, full = (windows(items, length, generator) for length in (CONTEXT_TOKENS // 2, CONTEXT_TOKENS))
    forward = torch.compile(model, dynamic=False) if args.compile else model
    begin, shown = time.time(), 0.0
    for step in range(args.steps):
        rows = full if step >= args.steps * 0.8 else short
        count = args.batch_tokens // (CONTEXT_TOKENS if rows is full else CONTEXT_TOKENS // 2)
        batch = torch.stack([next(rows) for _ in range(count)])
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * schedule(step, args.steps, args.steps // 20)
        with torch.autocast("cpu", torch.bfloat16):
            loss = token_loss(forward, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        shown = loss.item() if step == 0 else 0.95 * shown + 0.05 * loss.item()
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step} loss {shown:.4f} seconds {time.time() - begin:.0f}", flush=True)


@torch.no_grad()
def spread_channels(model, spread: float, seed: int) -> None:
    """Give activations the uneven channels that large models have, without changing what the model computes.

    A model this small has weights so even that 3 bits cost next to nothing. Scaling a channel up where it is produced
    (norm, up_proj, v_proj) and down where it is consumed leaves the function as it is, but groups of weights then mix
    large and small columns, as outlier channels of large models make them (LLM.int8(), arXiv 2208.07339). The log
    scales are normal with standard deviation `spread` x (0.5 to 1.5 by layer, shuffled), so that layers differ.
    """
    generator = torch.Generator().manual_seed(seed)
    config, layers = model.config, model.model.layers
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    factors = torch.linspace(0.5, 1.5, len(layers))[torch.randperm(len(layers), generator=generator)]
    for layer, factor in zip(layers, factors, strict=True):

        def scales(size: int, factor=factor) -> torch.Tensor:
            return torch.exp(spread * factor * torch.randn(size, generator=generator))

        attention, mlp = layer.self_attn, layer.mlp
        for norm, consumers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            scale = scales(config.hidden_size)
            norm.weight *= scale
            for linear in consumers:
                linear.weight /= scale
        scale = scales(config.intermediate_size)
        mlp.up_proj.weight *= scale[:, None]
        mlp.down_proj.weight /= scale
        scale = scales(kv_heads * head_dim)
        attention.v_proj.weight *= scale[:, None]
        attention.o_proj.weight /= scale.view(kv_heads, 1, head_dim).expand(-1, heads // kv_heads, -1).reshape(-1)


# ---------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def held_out_loss(model, held_out: dict[str, str], tokenizer) -> dict[str, float]:
    """Loss over all held-out files, each cut into rows of the full context (no overlap): nats per token and byte."""
    rows, bytes_total = [], 0
    for text in held_out.values():
        tokens = tokenizer.encode(text)
        bytes_total += len(text.encode())
        for start in range(0, len(tokens) - 1, CONTEXT_TOKENS):
            row = tokens[start : start + CONTEXT_TOKENS + 1]
            rows.append(row + [-100] * (CONTEXT_TOKENS + 1 - len(row)))
    batch = torch.tensor(rows)
    tokens_total = int((batch[:, 1:] >= 0).sum())
    nats = sum(token_loss(model, part, "sum").item() for part in batch.split(8))
    return {"nats_per_token": round(nats / tokens_total, 5), "nats_per_byte": round(nats / bytes_total, 5)}


def quantized(model, bits: int):
    """A copy whose decoder linears hold HQQ's dequantized weights (HQQ's own forward multiplies by the same)."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    clone = copy.deepcopy(model)
    for layer in clone.model.layers:
        for linear in [m for m in layer.modules() if isinstance(m, nn.Linear)]:
            config = BaseQuantizeConfig(nbits=bits, group_size=GROUP_SIZE, axis=1)
            packed = HQQLinear(
                copy.deepcopy(linear), config, compute_dtype=torch.float32, device="cpu", initialize=True
            )
            linear.weight.data = packed.dequantize().to(linear.weight.dtype)
    return clone


def measure(model, held_out, tokenizer) -> dict[str, dict[str, float]]:
    """Held-out loss per bit width of the decoder linears; "16" is the saved bf16 weights, computed in fp32."""
    losses = {"16": held_out_loss(model, held_out, tokenizer)}
    for bits in QUANTIZED_BITS:
        losses[str(bits)] = held_out_loss(quantized(model, bits), held_out, tokenizer)
        print(bits, losses[str(bits)], flush=True)
    return losses


# ---------------------------------------------------------------------------------------------------------- main


def save(model, tokenizer, out_dir: Path) -> None:
    """Hugging Face checkpoint in bf16: weights, config, generation config, tokenizer and chat template."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    half.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    path = out_dir / "tokenizer_config.json"  # the class name that every transformers version knows
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def describe(train: dict[str, str], held_out: dict[str, str], items: list[list[int]]) -> dict:
    return {
        "description": "source files of the Python standard library, split by file (sha256 of the path, 1 in 20), and "
        "conversations made from the documented functions of the training files",
        "python": platform.python_version(),
        "train_files": len(train),
        "train_bytes": sum(len(text.encode()) for text in train.values()),
        "train_tokens_with_chats": sum(map(len, items)),
        "chats": len(items) - len(train),
        "held_out_files": len(held_out),
        "held_out_bytes": sum(len(text.encode()) for text in held_out.values()),
    }


def write_record(out_dir: Path, record: dict, losses: dict[str, dict[str, float]]) -> None:
    """training.json: what the weights were made from, and the measured held-out losses in nats."""
    record |= {
        "precision": "bf16 autocast over fp32 weights in training; saved as bf16",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "held_out_loss": losses["16"],
        "held_out_loss_by_bits": {
            "provenance": "measured",
            "how": f"decoder linears through hqq HQQLinear, group {GROUP_SIZE}, axis 1; the rest as saved; run in fp32",
            **losses,
        },
    }
    text = json.dumps(record, indent=2) + "\n"
    (out_dir / "training.json").write_text(text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--steps", type=int, default=1080)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spread", type=float, default=0.6, help="unevenness of channels; 0 leaves them as trained")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    train, held_out = read_documents()
    tokenizer = train_tokenizer(list(train.values()), args.vocab)
    items = encode_items(train, tokenizer)
    model = build_model(args.vocab, tokenizer, args.layers)
    parameters = model.num_parameters()
    print(f"{len(train)} files, {len(items) - len(train)} chats, {parameters} parameters", flush=True)
    begin = time.time()
    train_model(model, items, args)
    seconds = time.time() - begin
    spread_channels(model, args.spread, args.seed)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, args.out_dir)
    saved = LlamaForCausalLM.from_pretrained(args.out_dir, dtype=torch.bfloat16).float().eval()
    record = {"data": describe(train, held_out, items), "parameters": parameters, "steps": args.steps}
    record |= {"schedule": "linear warm-up over 5 % of the steps, then cosine to 2 % of the peak"}
    record |= {"batch_tokens": args.batch_tokens, "learning_rate": args.learning_rate, "seed": args.seed}
    record |= {"channel_spread": args.spread, "compiled": args.compile, "train_seconds": round(seconds)}
    write_record(args.out_dir, record, measure(saved, held_out, tokenizer))


if __name__ == "__main__":
    main()
