"""Train the small Llama model that the tests use as their real model (`tests/assets/tiny-llama`).

The text is what every Python installation carries: the standard library's own source. Files are listed in sorted
order and held out by a hash of their relative path, so one interpreter version always gives one split. Pairs of
docstring and function, rendered through the chat template and closed by the end-of-turn token, teach the model to
answer a chat and to stop.

    OMP_NUM_THREADS=2 python scripts/train_tiny_model.py tests/assets/tiny-llama
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import json
import math
import platform
import random
import sysconfig
import textwrap
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages -%}
{% if message['role'] not in ['system', 'user', 'assistant'] %}
{{- raise_exception('unknown role: ' + message['role']) }}{% endif %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] | trim + eos_token + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
# Directories that not every installation has, and tables of numbers that teach nothing.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__"}
CONTEXT_TOKENS = 1024
QUANTIZED_BITS = (8, 4, 3, 2)
GROUP_SIZE = 64


# ---------------------------------------------------------------------------------------------------------- text


def read_documents() -> tuple[dict[str, str], dict[str, str]]:
    """Relative path -> text of the standard library's source files: (training, held out, one file in 20)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = {}, {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        # _sysconfigdata is written by the build and differs from machine to machine.
        if LEFT_OUT & set(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        name = relative.as_posix()
        part = held_out if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0 else train
        if len(text) > 200:
            part[name] = text
    return train, held_out


def functions_with_docstrings(text: str) -> list[tuple[str, str, str, str]]:
    """(name, signature, docstring's first paragraph, source) of every short documented function in `text`."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return []
    lines, found = text.splitlines(), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        summary = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        if summary and len(summary) <= 200 and 60 <= len(source) <= 700:
            found.append((node.name, source.splitlines()[0].strip(), summary, source))
    return found


def chat_of(name: str, signature: str, summary: str, source: str, kind: int) -> list[dict[str, str]]:
    """One conversation about a function; `kind` picks what is asked, so that answers differ in length."""
    write = [
        {"role": "user", "content": f"Write the Python function {name}. {summary}"},
        {"role": "assistant", "content": source},
    ]
    explain = [{"role": "user", "content": f"What does {name} do?"}, {"role": "assistant", "content": summary}]
    asked_source = [
        {"role": "user", "content": f"Describe in one sentence:\n{source}"},
        {"role": "assistant", "content": summary},
    ]
    complete = [
        {"role": "system", "content": "You complete Python code."},
        {"role": "user", "content": signature},
        {"role": "assistant", "content": source},
    ]
    return [write, write + explain, complete, explain, asked_source][kind % 5]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; like Llama's own it puts BOS before plain text, while the chat template writes BOS itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = [BOS, EOS, PAD, *ROLES]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        model_max_length=CONTEXT_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode_items(train: dict[str, str], tokenizer) -> list[list[int]]:
    """Token lists of all documents (`BOS text EOS`) and of one conversation per documented function."""
    items = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in train.values()]
    functions = [found for text in train.values() for found in functions_with_docstrings(text)]
    for index, found in enumerate(functions):
        rendered = tokenizer.apply_chat_template(chat_of(*found, kind=index), tokenize=False)
        items.append(tokenizer.encode(rendered, add_special_tokens=False))
    return items


def windows(items: list[list[int]], length: int, generator: random.Random):
    """Endless rows [length + 1] of int64 tokens: items joined in a fresh order each epoch, cut, rows shuffled."""
    while True:
        order = generator.sample(range(len(items)), len(items))
        stream = torch.tensor([token for index in order for token in items[index]])
        start = generator.randrange(length)
        rows = range(start, len(stream) - length - 1, length)
        for row in generator.sample(rows, len(rows)):
            yield stream[row : row + length + 1]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--steps", type=int, default=850)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    train, held_out = read_documents()
    tokenizer = train_tokenizer(list(train.values()), args.vocab)
    items = encode_items(train, tokenizer)
    tokens = sum(map(len, items))
    parameters = build_model(args.vocab, tokenizer, args.layers).num_parameters()
    print(f"{len(train)} files, {len(items) - len(train)} chats, {tokens} tokens, {parameters} parameters", flush=True)
    model = build_model(args.vocab, tokenizer, args.layers)
    begin = time.time()
    train_model(model, items, args)
    seconds = time.time() - begin
    args.out_dir.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, args.out_dir)
    saved = LlamaForCausalLM.from_pretrained(args.out_dir, dtype=torch.bfloat16).float().eval()
    losses = measure(saved, held_out, tokenizer)
    record = {
        "data": {
            "description": "source files of the Python standard library, split by file (sha256 of the path, 1 in 20)",
            "python": platform.python_version(),
            "train_files": len(train),
            "train_bytes": sum(len(text.encode()) for text in train.values()),
            "train_tokens_with_chats": tokens,
            "chats": len(items) - len(train),
            "held_out_files": len(held_out),
            "held_out_bytes": sum(len(text.encode()) for text in held_out.values()),
        },
        "parameters": parameters,
        "steps": args.steps,
        "batch_tokens": args.batch_tokens,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "precision": "bf16 autocast, fp32 master weights" + (", torch.compile" if args.compile else ""),
        "train_seconds": round(seconds),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "held_out_loss": losses["16"],
        "held_out_loss_by_bits": {
            "provenance": "measured",
            "how": f"all decoder linears through hqq HQQLinear, group {GROUP_SIZE}, axis 1, fp32; rest bf16 as saved",
            **losses,
        },
    }
    (args.out_dir / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
