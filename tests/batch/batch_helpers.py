"""Small real tokenizers and rows for the tests of batch files."""

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ds_llmpq.batch.request import CHAT_URL, COMPLETIONS_URL

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<s>", "</s>", "<|assistant|>"]
CORPUS = ["def f(x): return x + 1", "naïve café 你好世界 😀😀👩‍👩‍👧", "  for i in range(10):\n    print(i)\n"] * 8


@cache
def byte_level(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE that adds <s>; merges of some multi-byte characters, the others split into bytes."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<|assistant|>"]
    )
    tokenizer.chat_template = template
    return tokenizer


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """Like sentencepiece: ▁ for spaces, byte tokens as a fallback, the first space of a decoded text stripped."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in [
        "▁",
        "▁hello",
        "▁world",
        "lo",
        "wor",
        "ld",
        "▁▁",
        ".",
        "你",
        "a",
        "b",
        "▁a",
        "\n",
        "h",
        "e",
        "l",
        "o",
    ]:
        vocabulary[piece] = len(vocabulary)
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def chat_row(custom_id="a", content="hello", **body):
    body = {"model": "m", "messages": [{"role": "user", "content": content}]} | body
    return {"custom_id": custom_id, "method": "POST", "url": CHAT_URL, "body": body}


def completion_row(custom_id="a", prompt="def f(", **body):
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": COMPLETIONS_URL,
        "body": {"model": "m", "prompt": prompt} | body,
    }


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
