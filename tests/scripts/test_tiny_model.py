"""The trained model in tests/assets is small, whole, better than trivial, sensitive to bits, and ends its answers."""

import copy
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts import tiny_corpus as corpus
from scripts import train_tiny_model as training

TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny-llama"
# Written for this test, in nobody's standard library.
UNSEEN = '''import os
from pathlib import Path


class SegmentWriter:
    """Write numbered segments into a directory, each of at most `limit` bytes."""

    def __init__(self, directory, limit=4096):
        self.directory = Path(directory)
        self.limit = limit
        self._file = None
        self._number = 0

    def write(self, data):
        if not isinstance(data, bytes):
            raise TypeError("data must be bytes")
        if self._file is None or self._file.tell() + len(data) > self.limit:
            self._open_next()
        return self._file.write(data)

    def _open_next(self):
        self.close()
        self._number += 1
        self._file = open(os.path.join(self.directory, "%05d" % self._number), "wb")

    def close(self):
        if self._file is not None:
            self._file.close()
            self._file = None
'''


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def record():
    return json.loads((TINY / "training.json").read_text())


def test_asset_is_small_bf16_and_fit_for_groups_of_128(model, record):
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 12_000_000
    with safe_open(TINY / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    config = model.config
    assert (config.hidden_size % 128, config.intermediate_size % 128, config.vocab_size % 64) == (0, 0, 0)
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.num_hidden_layers >= 8
    assert 4e6 < model.num_parameters() < 8e6
    assert model.num_parameters() == record["parameters"]


@torch.no_grad()
def test_text_is_predicted_far_better_than_by_chance(model, tokenizer):
    measured = training.held_out_loss(model, {"unseen": UNSEEN}, tokenizer)
    shuffled = "\n".join(random.Random(0).sample(UNSEEN.split(" "), len(UNSEEN.split(" "))))
    assert measured["nats_per_byte"] < 1.2
    assert training.held_out_loss(model, {"shuffled": shuffled}, tokenizer)["nats_per_byte"] > 1.5


def test_recorded_losses_rise_as_bits_fall(record):
    by_bits = {int(bits): loss for bits, loss in record["held_out_loss_by_bits"].items() if bits.isdigit()}
    assert record["held_out_loss"] == by_bits[16]
    assert by_bits[16]["nats_per_byte"] < 1.2
    token_loss = {bits: loss["nats_per_token"] for bits, loss in by_bits.items()}
    assert abs(token_loss[8] - token_loss[16]) < 0.01
    assert token_loss[16] + 0.01 < token_loss[4] < token_loss[3] - 0.02 < token_loss[2] - 0.2


@pytest.mark.slow
@torch.no_grad()
def test_recorded_order_of_bits_is_measured_again_on_other_text(model, tokenizer):
    def loss(bits):
        return training.held_out_loss(training.quantized(model, bits), {"unseen": UNSEEN}, tokenizer)["nats_per_token"]

    full = training.held_out_loss(model, {"unseen": UNSEEN}, tokenizer)["nats_per_token"]
    assert full + 0.1 < loss(2)
    assert abs(loss(8) - full) < 0.03


@pytest.mark.parametrize("text", ["", "def f(x):\n\treturn x  # ünïcödé 日本\n", "  two  spaces ", "a\r\nb\0c"])
def test_text_survives_the_tokenizer(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens[1:]) == text


def test_chat_template(tokenizer):
    turns = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin|><|system|>\nBe brief.<|end|>\n<|user|>\nHello<|end|>\n<|assistant|>\nHi<|end|>\n"
        "<|user|>\nBye<|end|>\n<|assistant|>\n"
    )
    tokens = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert tokens.count(tokenizer.bos_token_id) == 1
    assert tokens.count(tokenizer.eos_token_id) == 4
    with pytest.raises(Exception, match="unknown role: tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


@pytest.mark.slow
@torch.no_grad()
def test_answers_to_chats_end(model, tokenizer):
    questions = ["What does read_file do?", "What does parse_header do?", "def close(self):", "Hello!"]
    lengths = []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
        tokens = model.generate(**prompt, max_new_tokens=160)[0, prompt["input_ids"].shape[1] :].tolist()
        assert tokens[-1] == tokenizer.eos_token_id
        lengths.append(len(tokens))
    assert len(set(lengths)) > 1
    assert min(lengths) > 1


@torch.no_grad()
def test_spreading_channels_leaves_the_function_unchanged(model, tokenizer):
    tokens = torch.tensor([tokenizer.encode(UNSEEN)])
    other = copy.deepcopy(model)
    training.spread_channels(other, 0.6, seed=1)
    torch.testing.assert_close(other(tokens).logits, model(tokens).logits, rtol=1e-3, atol=1e-3)
    before, after = (m.model.layers[0].mlp.down_proj.weight for m in (model, other))
    assert after.std(0).max() / after.std(0).min() > 2 * before.std(0).max() / before.std(0).min()


def test_documents_are_split_by_file():
    train, held_out = corpus.read_documents()
    assert len(held_out) >= 10
    assert not set(train) & set(held_out)
    assert all("test" not in Path(name).parts for name in train)
    assert corpus.read_documents() == (train, held_out)


def test_windows_cut_the_joined_items_without_gaps():
    items = [[index] * 7 for index in range(20)]
    rows = corpus.windows(items, 10, random.Random(0))
    epoch = torch.stack([next(rows) for _ in range(12)])
    assert epoch.shape == (12, 11)
    again = corpus.windows(items, 10, random.Random(0))
    assert torch.equal(epoch, torch.stack([next(again) for _ in range(12)]))
    counts = torch.bincount(epoch[:, :-1].flatten(), minlength=20)
    assert counts.max() <= 7
    assert (counts > 0).sum() >= 16


def test_learning_rate_warms_up_and_decays():
    rates = [training.schedule(step, steps=100, warmup=10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.02, abs=0.001)


def test_documented_functions_become_conversations(tokenizer):
    docstring = '"""Return the\n        area.\n\n        More."""'
    source = f"class A:\n    def area(self):\n        {docstring}\n        return self.a * self.b\n"
    ((name, signature, summary, text),) = corpus.functions_with_docstrings(source)
    assert (name, signature, summary) == ("area", "def area(self):", "Return the area.")
    assert text.startswith("def area(self):\n    ")
    assert corpus.functions_with_docstrings("def broken(:") == []
    for kind in range(5):
        chat = corpus.chat_of(name, signature, summary, text, kind)
        assert chat[-1]["role"] == "assistant"
        assert tokenizer.apply_chat_template(chat, tokenize=False).endswith("<|end|>\n")
