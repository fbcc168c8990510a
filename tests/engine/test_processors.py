"""Every key of generation_config.json that moves logits, against transformers' `generate` on the same checkpoint."""

import dataclasses
import json
import shutil

import pytest
import torch
from pipeline_cases import Case, make_plan
from transformers import AutoModelForCausalLM, GenerationConfig

from ds_llmpq.engine.sampling import LogitsProcessors, draw_uniform, sample
from ds_llmpq.models.generation import Generation, load_generation
from ds_llmpq.scheduler.request_group import RequestGroup, Sequence
from ds_llmpq.scheduler.sampling_params import GREEDY, SamplingParams
from ds_llmpq.scheduler.slot_table import Finish

PROMPTS = [(5, 9, 3, 5, 9), (17,), tuple(range(20, 32))]
TOKENS = 14
PLAIN = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"repetition_penalty": 0.7, "min_new_tokens": 14, "no_repeat_ngram_size": 1},
    {"repetition_penalty": 0.7, "min_new_tokens": 14, "no_repeat_ngram_size": 2},
    {"repetition_penalty": 0.7, "min_new_tokens": 14, "no_repeat_ngram_size": 3},
    {"min_length": 12},
    {"min_new_tokens": 6},
    {"forced_bos_token_id": 33},
    {"min_new_tokens": 14, "forced_eos_token_id": 1},
    {"min_new_tokens": 14, "forced_eos_token_id": [1, 4]},
    {"min_new_tokens": 5, "exponential_decay_length_penalty": [2, 1.5]},
]
BY_TOKENS = {
    "suppress_tokens": lambda tokens: [*tokens[:3], 5000, -1],
    "begin_suppress_tokens": lambda tokens: tokens[:2],
    "bad_words_ids": lambda tokens: [tokens[:1], tokens[1:3], [tokens[4], tokens[5]], [1]],
    "sequence_bias": lambda tokens: [[tokens[:1], -9.0], [tokens[2:4], -7.5], [[7], 2.5]],
    "eos_token_id": lambda tokens: [tokens[5], tokens[9]],
}


def with_defaults(source, folder, values: dict):
    """A copy of a checkpoint whose generation_config.json also has these values."""
    shutil.copytree(source, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


_models: dict[bytes, AutoModelForCausalLM] = {}


def loaded(folder):
    """transformers' model; folders here differ in generation_config.json alone, so one serves all of them."""
    weights = (folder / "model.safetensors").read_bytes()
    if weights not in _models:
        _models[weights] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return _models[weights]


def reference(folder, prompts=PROMPTS, tokens=TOKENS, **options) -> list[list[int]]:
    """What transformers generates, the end-of-sequence token included."""
    model, found = loaded(folder), []
    model.generation_config = GenerationConfig.from_pretrained(folder)
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, **options)
        found.append(out[0, len(prompt) :].tolist())
    return found


def generated(folder, rows: list[Sequence]) -> list[list[int]]:
    """The same with our processors and sampler on transformers' logits, all rows together."""
    model, defaults = loaded(folder), load_generation(folder)
    processors = LogitsProcessors(defaults)
    tokens = [list(row.generated) for row in rows]
    for slot, row in enumerate(rows):
        processors.begin(slot, row)
    running = list(range(len(rows)))
    while running:
        with torch.no_grad():
            known = [torch.tensor([[*rows[slot].prompt, *tokens[slot]]]) for slot in running]
            logits = torch.stack([model(each).logits[0, -1] for each in known])
        logits = processors(logits, running, [tokens[slot] for slot in running])
        samplings, steps = [rows[slot].sampling for slot in running], [len(tokens[slot]) for slot in running]
        for slot, token in zip(list(running), sample(logits, samplings, steps, defaults).tolist(), strict=True):
            tokens[slot].append(token)
            ended = token in defaults.eos_token_ids and not rows[slot].sampling.ignore_eos
            if ended or len(tokens[slot]) == rows[slot].max_tokens:
                running.remove(slot)
    return tokens


def rows_of(sampling=GREEDY, tokens=TOKENS) -> list[Sequence]:
    return [Sequence(key, prompt, tokens, sampling) for key, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def ending(checkpoint_of, tmp_path_factory):
    """A checkpoint whose greedy answers end early, so that what puts the end off can be seen."""
    llama = checkpoint_of("llama")
    plain = reference(llama)
    folder = tmp_path_factory.mktemp("ending") / "model"
    return with_defaults(llama, folder, {"eos_token_id": [plain[0][2], plain[1][3], plain[2][1]]})


@pytest.mark.parametrize("values", PLAIN, ids=lambda values: "-".join(values))
def test_a_key_gives_the_tokens_of_generate(ending, tmp_path, values):
    folder = with_defaults(ending, tmp_path / "model", values)
    wanted = reference(folder)
    assert generated(folder, rows_of()) == wanted
    without = with_defaults(ending, tmp_path / "without", dict(list(values.items())[:-1]))
    assert wanted != reference(without), "the last key changes nothing here: the test would not see it"


@pytest.mark.parametrize("key", BY_TOKENS)
def test_a_key_that_names_tokens_gives_those_of_generate(checkpoint_of, tmp_path, key):
    llama = checkpoint_of("llama")
    plain = reference(llama)
    folder = with_defaults(llama, tmp_path / "model", {key: BY_TOKENS[key](plain[0])})
    wanted = reference(folder)
    assert generated(folder, rows_of()) == wanted
    assert wanted != plain


def test_all_keys_together(ending, tmp_path):
    plain = reference(ending)
    values = {
        "repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "min_new_tokens": 5, "suppress_tokens": plain[0][:1],
        "begin_suppress_tokens": plain[2][:1], "bad_words_ids": [plain[1][:2]], "sequence_bias": [[[8], 1.5]],
        "exponential_decay_length_penalty": [4, 1.1],
    }  # fmt: skip
    folder = with_defaults(ending, tmp_path / "model", values)
    assert generated(folder, rows_of()) == reference(folder)


def test_a_row_s_own_values_win(ending, tmp_path):
    folder = with_defaults(ending, tmp_path / "model", {"repetition_penalty": 1.4, "min_new_tokens": 3})
    sampling = SamplingParams(repetition_penalty=1.15, min_tokens=7)
    assert generated(folder, rows_of(sampling)) == reference(folder, repetition_penalty=1.15, min_new_tokens=7)
    off = SamplingParams(repetition_penalty=1.0, min_tokens=0)
    assert generated(folder, rows_of(off)) == reference(ending)


def test_a_row_admitted_again_goes_on_as_if_it_had_not_left(ending, tmp_path):
    folder = with_defaults(ending, tmp_path / "model", {"repetition_penalty": 1.3, "min_new_tokens": 9})
    wanted = generated(folder, rows_of(SamplingParams(frequency_penalty=0.4)))
    for row, tokens in zip(rows_of(SamplingParams(frequency_penalty=0.4)), wanted, strict=True):
        again = dataclasses.replace(row, generated=tuple(tokens[:5]))
        assert generated(folder, [again]) == [tokens]


def test_presence_and_frequency_penalties_count_generated_tokens():
    row = Sequence(0, (4, 4, 4), 9, SamplingParams(presence_penalty=0.5, frequency_penalty=0.25))
    processors = LogitsProcessors(Generation())
    processors.begin(0, row)
    logits = torch.zeros(1, 6)
    found = processors(logits, [0], [[1, 2, 2, 2]])
    assert found[0].tolist() == [0, -0.75, -1.25, 0, 0, 0]
    assert not logits.any(), "what the model said must stay, for it may be needed again"


def test_rows_that_ask_for_nothing_are_left_alone():
    processors = LogitsProcessors(Generation())
    processors.begin(0, Sequence(0, (1, 2), 5))
    logits = torch.randn(1, 8)
    assert processors(logits, [0], [[3]]) is logits
    processors.begin(1, Sequence(1, (1, 2), 5, SamplingParams(repetition_penalty=2.0)))
    both = torch.randn(2, 8)
    found = processors(both, [0, 1], [[3], [3]])
    assert torch.equal(found[0], both[0])
    assert not torch.equal(found[1], both[1])
    processors.begin(1, Sequence(2, (1, 2), 5))  # the slot's next row
    assert processors(both, [0, 1], [[3], [3]]) is both


TRUNCATIONS = [
    {"min_p": 0.2}, {"typical_p": 0.4}, {"typical_p": 0.9}, {"epsilon_cutoff": 0.05}, {"eta_cutoff": 0.05},
    {"top_h": 0.4}, {"top_h": 0.8, "min_p": 0.05}, {"min_p": 0.05, "typical_p": 0.8, "epsilon_cutoff": 0.03},
]  # fmt: skip


@pytest.mark.parametrize("values", TRUNCATIONS, ids=lambda values: "-".join(map(str, values.items())))
def test_a_truncation_leaves_what_generate_leaves(checkpoint_of, tmp_path, values):
    """The same tokens with the same probabilities, drawn with our own random numbers."""
    folder = with_defaults(checkpoint_of("llama"), tmp_path / "model", values)
    defaults = load_generation(folder)
    model = loaded(folder)
    config = GenerationConfig(do_sample=True, temperature=0.8, top_p=0.95, top_k=40, **values)
    logits = torch.randn(7, 128, generator=torch.Generator().manual_seed(3)) * 2
    kept = model._get_logits_processor(config, 3)(torch.zeros(7, 3, dtype=torch.long), logits.clone())
    shares, order = kept.double().softmax(-1).sort(descending=True, stable=True)
    assert (kept.isfinite().sum(-1) < 40).all()
    for seed in range(60):
        rows = [SamplingParams(0.8, 0.95, 40, seed=seed)] * 7
        draws = torch.full((7, 1), draw_uniform(seed, 0), dtype=torch.float64)
        wanted = order.gather(-1, torch.searchsorted(shares.cumsum(-1), draws, right=True))[:, 0]
        assert sample(logits, rows, [0] * 7, defaults).tolist() == wanted.tolist()
    row = SamplingParams(0.8, 0.95, 40, seed=1, min_p=1.0)
    assert torch.equal(sample(logits, [row] * 7, [0] * 7, defaults), logits.argmax(-1))
    assert torch.equal(sample(logits, [GREEDY] * 7, [0] * 7, defaults), logits.argmax(-1))


def test_the_pipeline_penalizes_rows_of_any_micro_batch_and_slot(ranks, ending, tmp_path):
    """Three stages, more rows than slots, and slots too short for the answers: rows leave and come again."""
    folder = with_defaults(ending, tmp_path / "model", {"repetition_penalty": 1.3, "min_new_tokens": 10})
    wanted, eos = reference(folder), load_generation(folder).eos_token_ids
    plan = make_plan(folder, [(0, 2), (2, 3), (3, 5)], micro_batch=(2, 2), workload=(3, 16, 16))
    rows = tuple(rows_of())
    whole = Case(folder, plan, (RequestGroup(rows),), eos)
    joined = Case(
        folder, plan, (RequestGroup(rows[:2], 2, 30, joins=True), RequestGroup(rows[2:], 2, 30, joins=True)), eos
    )
    short = Case(folder, plan, (RequestGroup(rows, 3, 18),), eos)
    for outcome in ranks.run(whole, joined, short):
        found = [tokens for group in range(2) for tokens in outcome.tokens(group)]
        again = [tokens for tokens in found if tokens]
        assert sorted(again) == sorted(wanted)
        assert Finish.NAN_LOGITS not in outcome.finish()
