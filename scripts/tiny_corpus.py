"""Text, chat template and tokenizer of the small test model; all of it comes from the standard library's source."""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
import textwrap
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

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
