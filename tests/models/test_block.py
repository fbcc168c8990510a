"""Our block against transformers, in float32, for every family and its variations."""

import random

import pytest
import torch
import transformers
from tiny_models import LAYERS, MODELS, VOCABULARY, decode_step, our_model, stored_tensors, transformers_model
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.activations import ACT2FN

from ds_llmpq.errors import UserError
from ds_llmpq.models.block import ACTIVATIONS, Experts, attend
from ds_llmpq.models.families import describe
from ds_llmpq.models.shape import read_shape
from ds_llmpq.models.spec import ACTIVATIONS as NAMES
from ds_llmpq.models.step import Step

TOLERANCE = 2e-5  # of the largest logit
# where angles follow the length of a sequence, a whole pass is no measure for its tokens one by one
SAME_ANGLES = [name for name in MODELS if name != "phi3-long"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(name): (transformers' model, ours from the checkpoint it saves)."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            theirs = transformers_model(name)
            theirs.save_pretrained(folder)
            made[name] = theirs, our_model(folder), folder
        return made[name]

    return get


def drawn(seed, lengths):
    numbers = random.Random(seed)
    return [[numbers.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]


@torch.no_grad()
def logits_of(theirs, row):
    """[tokens, vocabulary] of one sequence, without a cache."""
    return theirs(torch.tensor([row]), use_cache=False).logits[0]


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_pass_gives_the_logits_of_transformers(models, name):
    theirs, ours, _ = models(name)
    rows = drawn(1, (9, 20, 1))
    found = ours.prefill(rows)
    for row, logits in zip(rows, found, strict=True):
        if name in SAME_ANGLES or len(row) == 20:
            assert_close(logits[: len(row)], logits_of(theirs, row))


@pytest.mark.parametrize("name", SAME_ANGLES)
def test_prompts_of_any_length_and_cached_tokens_give_the_logits_of_transformers(models, name):
    """Rows of different lengths are padded together, then go on together at positions of their own."""
    theirs, ours, _ = models(name)
    whole = drawn(2, (14, 9, 17, 10))
    prompts = [row[: len(row) - 8] for row in whole]
    store = ours.store(4, 24)
    store._memory.fill_(torch.nan)  # masked or not: what was never written must not count
    store.clear()
    expected = [logits_of(theirs, row) for row in whole]
    found = ours.prefill(prompts, store)
    for index, row in enumerate(prompts):
        assert_close(found[index], expected[index][len(row) - 1])
    for offset in range(8):
        positions = [len(row) + offset for row in prompts]
        tokens = [row[at] for row, at in zip(whole, positions, strict=True)]
        found = ours.decode(tokens, positions, store, max(positions) + 1 + offset % 2)
        for index, at in enumerate(positions):
            assert_close(found[index], expected[index][at])


@pytest.mark.parametrize("name", SAME_ANGLES)
def test_rows_with_and_without_a_prefix_held_once_give_the_logits_of_transformers(models, name):
    """Rows of either kind decode together; windows are shorter than the prefix, and later than its end."""
    theirs, ours, _ = models(name)
    prefix, shared = drawn(7, (10,))[0], [10, 0, 10, 0]
    whole = [prefix[:length] + row for length, row in zip(shared, drawn(8, (12, 20, 9, 11)), strict=True)]
    prompts = [row[: len(row) - 8] for row in whole]
    store = ours.store_behind(prefix, 4, 20)
    expected = [logits_of(theirs, row) for row in whole]
    for slots, of_prefix in (([0, 2], 10), ([1, 3], 0)):
        found = ours.prefill([prompts[slot][of_prefix:] for slot in slots], store, slots, of_prefix)
        for logits, slot in zip(found, slots, strict=True):
            assert_close(logits, expected[slot][len(prompts[slot]) - 1])
    for offset in range(8):
        positions = [len(row) + offset for row in prompts]
        tokens = [row[at] for row, at in zip(whole, positions, strict=True)]
        found = ours(decode_step(store, 0, tokens, positions, 20, shared))[:, 0]
        for index, at in enumerate(positions):
            assert_close(found[index], expected[index][at])


@pytest.mark.parametrize("name", ["llama", "bloom", "gemma2", "mistral-window", "mixtral"])
def test_rows_that_stand_alike_decode_without_a_mask(models, name):
    theirs, ours, _ = models(name)
    whole = drawn(3, (12, 12))
    store = ours.store(2, 12)
    ours.prefill([row[:6] for row in whole], store)
    for at in range(6, 12):
        found = ours.decode([row[at] for row in whole], [at, at], store, at + 1)
        for index, row in enumerate(whole):
            assert_close(found[index], logits_of(theirs, row)[at])


def test_long_sequences_take_the_long_angles(models):
    """As transformers' cached pass has it: keys already stored stay as they were when a row passes the border."""
    theirs, ours, _ = models("phi3-long")
    for length in (11, 12, 13, 20):
        row = drawn(length, (length,))[0]
        assert_close(ours.prefill([row])[0], logits_of(theirs, row))
    row, short = drawn(4, (16, 5))
    store = ours.store(2, 20)
    ours.prefill([row[:10], short[:3]], store)
    with torch.no_grad():
        first = theirs(torch.tensor([row[:10]]), use_cache=True)
        name = "cache" if "cache" in first else "past_key_values"  # up to transformers 5.23 the second
        for at in range(10, 16):
            expected = theirs(torch.tensor([[row[at]]]), **{name: first[name]}, use_cache=True).logits[0, 0]
            other = min(at - 7, 4)
            found = ours.decode([row[at], short[other]], [at, other], store, at + 1)
            assert_close(found[0], expected)


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_the_checkpoint_has_its_place(models, name):
    _, ours, folder = models(name)
    decoder = ours.decoder
    named = [decoder.embedding_tensors(), decoder.head_tensors(), *map(decoder.layer_tensors, range(LAYERS))]
    assert {theirs for names in named for theirs in names.values()} == set(stored_tensors(folder))


@pytest.mark.parametrize("name", MODELS)
def test_roles_are_the_linears_that_there_are(models, name):
    _, ours, folder = models(name)
    for index, layer in enumerate(ours.layers):
        there = {
            path: (module.out_features, module.in_features, module.bias is not None)
            for path, module in layer.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        roles = ours.decoder.linears(index)
        assert {role.name: role[1:4] for role in roles.values()} == there
        prefix = ours.decoder.layer_prefix(index)
        assert all(f"{prefix}{theirs}.weight" in stored_tensors(folder) for theirs in roles)
        inputs = {role.name: role.input for role in roles.values()}
        if "self_attn.q_proj" in inputs:
            assert inputs["self_attn.q_proj"] == inputs["self_attn.k_proj"] == inputs["self_attn.v_proj"]
        assert all(role.expert is not None for role in roles.values() if ".experts." in role.name)


@pytest.mark.parametrize("name", MODELS)
def test_planning_sees_the_same_model(models, name):
    """Without torch: the linears and parameters that there are."""
    theirs, ours, folder = models(name)
    if name == "qwen3-moe-mixed":
        with pytest.raises(UserError, match="mixes layers with experts"):
            read_shape(folder)
        return
    shape = read_shape(folder)
    for index, layer in enumerate(ours.layers):
        roles = ours.decoder.linears(index)
        assert {linear.name: linear[1:3] for linear in shape.linears} == {own: role[1:3] for own, role in roles.items()}
        assert set(shape.biased) == {own for own, role in roles.items() if role.bias}
        assert shape.layer_parameters == sum(parameter.numel() for parameter in layer.parameters())
    assert shape.embed_parameters == sum(parameter.numel() for parameter in ours.embedding.parameters())
    assert shape.head_parameters == sum(parameter.numel() for parameter in ours.head.parameters())
    assert shape.parameters == sum(parameter.numel() for parameter in theirs.parameters())
    attention = ours.decoder.spec.attention
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (attention.heads, attention.kv_heads, attention.head_dim)
    assert shape.tied_embeddings == ours.decoder.spec.tied


@pytest.mark.parametrize("name", ["mixtral", "mixtral-window", "qwen3-moe", "qwen3-moe-mixed"])
def test_experts_in_fixed_shapes_give_the_same(models, name):
    _, ours, _ = models(name)
    rows = drawn(5, (9, 14))
    chosen = ours.prefill(rows)
    ours.set_static()
    static = ours.prefill(rows)
    for layer in ours.layers:
        if isinstance(layer.mlp, Experts):
            layer.mlp.static = False
    assert_close(static, chosen)


class TracedCache:
    """A cache of fixed size, given as a tensor [layers, 2, rows, groups, capacity, features]."""

    in_place = False

    def __init__(self, memory, positions):
        self.memory, self.positions = memory, positions

    def update(self, key, value, layer_idx):
        rows = torch.arange(len(self.positions))
        for part, fresh in zip(self.memory[layer_idx], (key, value), strict=True):
            part.transpose(1, 2)[rows, self.positions] = fresh[:, :, 0]
        return self.memory[layer_idx, 0], self.memory[layer_idx, 1]


@pytest.mark.parametrize(
    "name", ["mistral-window", "opt-projected-post-norm", "bloom", "gemma2", "gemma3-scaled", "phi3-long", "mixtral"]
)  # fmt: skip
def test_a_decode_step_traced_once_replays_to_the_same_bits(models, name):
    """For other tokens and positions: nothing in the step was decided by a tensor's values."""
    _, ours, _ = models(name)
    ours.set_static()
    spec, capacity, rows = ours.decoder.spec.attention, 20, 3

    def step(tokens, positions, memory):
        cache = TracedCache(memory, positions)
        logits = ours(Step(positions[:, None], cache, capacity, False, token_ids=tokens[:, None]))
        return logits[:, 0].argmax(-1), logits

    def drawn_inputs(seed):
        numbers = torch.Generator().manual_seed(seed)
        memory = torch.randn(LAYERS, 2, rows, spec.kv_heads, capacity, spec.head_dim, generator=numbers)
        return (
            torch.randint(3, VOCABULARY, (rows,), generator=numbers),
            torch.randint(0, capacity - 4, (rows,), generator=numbers),
            memory,
        )

    traced = make_fx(step)(*drawn_inputs(0))
    for seed in (1, 2):
        (tokens, positions, memory), (_, _, other) = drawn_inputs(seed), drawn_inputs(seed)
        for offset in range(3):
            (found, logits), (again, replayed) = (
                run(tokens, positions + offset, cache) for run, cache in ((step, memory), (traced, other))
            )
            assert torch.equal(logits, replayed)
            assert torch.equal(memory, other)
            assert torch.equal(found, again)
            tokens = found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_attention_is_the_softmax_of_scores(masked, tokens, groups):
    torch.manual_seed(tokens)
    rows, heads, size, seen = 3, 6, 8, 9 if tokens == 1 else tokens
    query = torch.randn(rows, heads, tokens, size, dtype=torch.double)
    key, value = torch.randn(2, rows, groups, seen, size, dtype=torch.double)
    mask = torch.ones(tokens, seen, dtype=torch.bool).tril(seen - tokens).expand(rows, 1, -1, -1)
    if masked:
        mask = mask & (torch.rand(rows, 1, tokens, seen) < 0.7)
        mask[..., 0] = True
    each = [states.repeat_interleave(heads // groups, 1) for states in (key, value)]
    for limit in (None, 0.7):
        scores = query @ each[0].transpose(2, 3) * 0.3
        scores = scores if limit is None else limit * torch.tanh(scores / limit)
        expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ each[1]
        found = attend(query, key, value, mask if masked else None, 0.3, limit)
        assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_activations_are_those_of_transformers(name):
    inputs = torch.linspace(-8, 8, 101)
    assert torch.allclose(ACTIVATIONS[name](inputs), ACT2FN[name](inputs), atol=1e-5)


def test_every_activation_that_is_read_is_there():
    assert set(NAMES) == set(ACTIVATIONS)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"hidden_act": "nonsense"}, "hidden_act is 'nonsense', but must be one of silu, "),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type is 'spiral', but must be one of default, linear"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_what_is_not_supported_is_said(keys, said):
    with pytest.raises(UserError, match=said):
        describe(transformers.LlamaConfig(hidden_size=64, num_attention_heads=4).to_dict() | keys)
