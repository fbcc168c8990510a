"""Decode passes recorded once and replayed: the same bits as the eager pass, for all families, with no host read."""

import random
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ds_llmpq.engine.runner.capture import capture_trace
from ds_llmpq.engine.runner.captured_decode import CapturedDecode

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from tiny_models import VOCABULARY, Stage, decode_step, our_model, transformers_model

SLOTS, CAPACITY = 5, 40
# of each family one; that all variations can be traced is `tests/models/test_block.py`'s subject
KINDS = [
    "llama", "mistral-window", "qwen2-window", "qwen3", "opt-projected-post-norm", "bloom", "gemma2", "gemma3",
    "phi3-long", "mixtral", "qwen3-moe-mixed",
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            transformers_model(name).save_pretrained(folder)
            made[name] = our_model(folder)
        return made[name]

    return get


def filled(ours, lengths, seed):
    """A store whose slots hold prompts of these lengths."""
    numbers = random.Random(seed)
    store = ours.store(SLOTS, CAPACITY)
    ours.prefill([[numbers.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths], store)
    return store


@torch.no_grad()
def eager(module, positional, step):
    step.prepare = positional
    done = module(step)
    return done.hidden, done.logits


@pytest.mark.parametrize("name", KINDS)
def test_a_replayed_pass_has_the_bits_of_the_eager_one(models, name):
    """Other tokens, positions and contexts than it was recorded with; rows that have ended go along."""
    ours = models(name)
    module, positional = Stage(ours.embedding, *ours.layers, ours.head), ours.decoder.positions()
    lengths = [3, 9, 1, 12, 6]
    captured, plain = (filled(ours, lengths, 1) for _ in range(2))
    runner = CapturedDecode(module, captured, positional, capture_trace, torch.float32)
    positions, numbers = list(lengths), random.Random(2)
    for number in range(6):
        tokens = [numbers.randrange(3, VOCABULARY) for _ in range(SLOTS)]
        _, logits = runner.run(decode_step(captured, 0, tokens, positions, max(positions) + 1))
        ours.set_static()  # in what order experts are summed shows in the last bits
        _, expected = eager(module, positional, decode_step(plain, 0, tokens, positions, CAPACITY))
        assert torch.equal(logits, expected)
        assert torch.equal(captured._memory, plain._memory)
        # one row ends after each pass, and stays where it is
        positions = [place + (row > number - 2) for row, place in enumerate(positions)]
    assert runner.graphs == 1


@pytest.mark.parametrize("name", ["llama", "mistral-window", "bloom", "gemma2"])
def test_rows_with_and_without_a_prefix_replay_to_the_bit(models, name):
    """Which rows have it changes from pass to pass; the pass in which none has it is another graph."""
    ours = models(name)
    module, positional = Stage(ours.embedding, *ours.layers, ours.head), ours.decoder.positions()
    numbers, prefix = random.Random(6), [5, 9, 4, 8, 7, 11]
    captured, plain = (ours.store_behind(prefix, SLOTS, CAPACITY) for _ in range(2))
    runner = CapturedDecode(module, captured, positional, capture_trace, torch.float32)
    for number in range(5):
        shared = [len(prefix) * (numbers.random() < 0.5 and number < 4) for _ in range(SLOTS)]
        shared[number] = len(prefix) * (number < 4)
        own = [numbers.randrange(CAPACITY) for _ in range(SLOTS)]
        tokens = [numbers.randrange(3, VOCABULARY) for _ in range(SLOTS)]
        positions, given = [*map(sum, zip(own, shared, strict=True))], shared if any(shared) else None
        steps = [decode_step(store, 0, tokens, positions, CAPACITY, given) for store in (captured, plain)]
        _, logits = runner.run(steps[0])
        _, expected = eager(module, positional, steps[1])
        assert torch.equal(logits, expected)
        assert torch.equal(captured.memory, plain.memory)
        assert runner.graphs == 1 + (number == 4)


def test_stages_behind_the_first_take_hidden_states(models):
    ours = models("llama")
    positional = ours.decoder.positions()
    store, plain = filled(ours, [4, 7, 2], 3), filled(ours, [4, 7, 2], 3)
    module = Stage(*ours.layers)
    runner = CapturedDecode(module, store, positional, capture_trace, torch.float32, hidden_size=64)
    for offset in range(3):
        hidden = torch.randn(3, 1, 64)
        steps = [
            decode_step(each, 0, [0] * 3, [4 + offset, 7 + offset, 2 + offset], CAPACITY) for each in (store, plain)
        ]
        for step in steps:
            step.hidden = hidden.clone()
        found, logits = runner.run(steps[0])
        expected, _ = eager(module, positional, steps[1])
        assert torch.equal(found, expected)
        assert logits is None


def test_one_graph_for_each_shape_and_the_oldest_go_first(models):
    ours = models("llama")
    module = Stage(ours.embedding, *ours.layers, ours.head)
    store = filled(ours, [2] * SLOTS, 4)
    runner = CapturedDecode(module, store, ours.decoder.positions(), capture_trace, torch.float32, most_graphs=2)
    recorded = []
    keep = runner.capture
    runner.capture = lambda *arguments: recorded.append(None) or keep(*arguments)

    def run(first, rows):
        return runner.run(decode_step(store, first, [5] * rows, [2] * rows, 3))[1]

    whole = run(0, SLOTS)
    assert torch.allclose(run(3, 2), whole[3:], atol=1e-5)
    run(0, SLOTS)
    assert len(recorded) == 2
    run(1, 2)
    run(0, SLOTS)
    assert len(recorded) == 3
    run(3, 2)
    assert (len(recorded), runner.graphs) == (4, 2)


def test_another_cut_of_the_store_is_another_graph(models):
    ours = models("llama")
    module, positional = Stage(ours.embedding, *ours.layers, ours.head), ours.decoder.positions()
    store = filled(ours, [3, 3, 3], 5)
    runner = CapturedDecode(module, store, positional, capture_trace, torch.float32)
    runner.run(decode_step(store, 0, [4, 5], [3, 3], 4))
    store.shape_for(2, 2 * CAPACITY)
    store.clear()
    _, found = runner.run(decode_step(store, 0, [4, 5], [0, 0], 1))
    _, expected = eager(module, positional, decode_step(store, 0, [4, 5], [0, 0], 2 * CAPACITY))
    assert torch.equal(found, expected)


def test_outputs_are_in_the_same_memory_at_every_call(models):
    """What a CUDA graph needs; a trace makes new tensors, so the inputs' buffers are looked at."""
    ours = models("llama")
    store = filled(ours, [3, 3], 6)
    module = Stage(ours.embedding, *ours.layers, ours.head)
    runner = CapturedDecode(module, store, ours.decoder.positions(), capture_trace, torch.float32)
    runner.run(decode_step(store, 0, [4, 5], [3, 3], 4))
    addresses = runner._inputs.data_ptr(), runner._positions.data_ptr(), store._memory.data_ptr()
    for offset in range(1, 4):
        runner.run(decode_step(store, 0, [4, 5], [3 + offset] * 2, 4 + offset))
        assert addresses == (runner._inputs.data_ptr(), runner._positions.data_ptr(), store._memory.data_ptr())


def test_a_host_read_in_the_pass_is_an_error(models):
    ours = models("llama")
    store = filled(ours, [3, 3], 7)
    positional = ours.decoder.positions()

    def reading(step):
        positional(step)
        assert int(step.positions.max()) >= 0

    module = Stage(ours.embedding, *ours.layers, ours.head)
    runner = CapturedDecode(module, store, reading, capture_trace, torch.float32)
    with pytest.raises((GuardOnDataDependentSymNode, DataDependentOutputException)):
        runner.run(decode_step(store, 0, [4, 5], [3, 3], 4))


def test_experts_see_every_token_only_while_a_pass_is_captured(models):
    """Chosen one by one they take shapes from values, which cannot be captured; prefill goes on as it was."""
    ours = models("mixtral")
    for layer in ours.layers:
        layer.mlp.static = False
    store = filled(ours, [3, 3], 7)
    module = Stage(ours.embedding, *ours.layers, ours.head)
    step = decode_step(store, 0, [4, 5], [3, 3], 4)
    with pytest.raises(GuardOnDataDependentSymNode):
        capture_trace(lambda memory: eager(module, ours.decoder.positions(), step), (store.memory,))
    runner = CapturedDecode(module, store, ours.decoder.positions(), capture_trace, torch.float32)
    runner.run(decode_step(store, 0, [4, 5], [3, 3], 4))
    assert runner.graphs == 1
    assert not any(layer.mlp.static for layer in ours.layers)
