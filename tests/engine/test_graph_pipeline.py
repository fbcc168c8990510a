"""Stages that are one graph each, in a pipeline whose slots refill, against transformers in one process."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from pipeline_cases import LAYERS, QUANT, VARIANTS, Case, Draw, make_plan, reference

from ds_llmpq.integers import round_up
from ds_llmpq.quant.kernels.openvino import CACHE_BLOCK
from ds_llmpq.quant.onednn_linear import computes_in_bfloat16
from ds_llmpq.scheduler.request_group import RequestGroup, Sequence
from ds_llmpq.scheduler.sampling_params import SamplingParams
from ds_llmpq.scheduler.slot_table import Finish

needs_openvino = pytest.mark.skipif(
    not importlib.util.find_spec("openvino") or not computes_in_bfloat16(),
    reason="needs OpenVINO, and a processor with bfloat16 arithmetic",
)
FAMILY = [name for name in VARIANTS if name.split("-")[0] not in ("gemma2", "mixtral")]
PROMPT, GENERATED, SLOTS = 24, 40, 4


def graph_plan(path, stages, bits=None, workload=(SLOTS, PROMPT, GENERATED), dtype="bfloat16", kv_bits=16):
    quant = QUANT | {"kernel": "openvino_graph", "kv_bits": kv_bits}
    plan = make_plan(path, stages, bits, micro_batch=(3, 2), workload=workload, dtype=dtype, quant=quant)
    return replace(plan, stages=tuple(replace(stage, kernel="openvino_graph") for stage in plan.stages))


def refilled(path, stages, bits=None, dtype="bfloat16", kv_bits=16):
    """Eleven requests of different prompts and answers for four slots, which are in two decode groups."""
    draw = Draw(seed=len(str(path.name)))
    answers = [1, 40, 3, 17, 9, 30, 2, 5, 21, 12, 7]
    rows = tuple(
        Sequence(key, draw.prompt(1 + 7 * key % PROMPT), answer, sampling=SamplingParams(ignore_eos=True))
        for key, answer in enumerate(answers)
    )
    capacity = round_up(PROMPT + GENERATED, CACHE_BLOCK)
    group = RequestGroup(rows, SLOTS, capacity, joins=True)
    plan = graph_plan(path, stages, bits, dtype=dtype, kv_bits=kv_bits)
    return Case(path, plan, (group,), logits=True, label=path.name)


def errors(case, outcome, bits=()):
    """Root mean squares of what the pipeline's logits, and those of transformers in bfloat16, are off from float32."""
    ours, theirs = [], []
    texts = [row.prompt + tuple(tokens) for row, tokens in zip(case.groups[0].sequences, outcome.tokens(), strict=True)]
    rounded = [reference(case.path, bits, "bfloat16").logits(text) for text in texts]
    exact = [reference(case.path, bits).logits(text) for text in texts]
    for row, generated, values in outcome.stage(len(case.plan.stages) - 1)["logits"]:
        at = len(case.groups[0].sequences[row].prompt) - 1 + generated
        ours.append(torch.tensor(values) - exact[row][at])
        theirs.append(rounded[row][at] - exact[row][at])
    assert len(ours) == sum(map(len, outcome.tokens()))
    return tuple(torch.stack(part).square().mean().sqrt() for part in (ours, theirs))


@needs_openvino
@pytest.mark.parametrize("stages", [[(0, LAYERS)], [(0, 2), (2, LAYERS)]])
def test_logits_are_as_near_to_float32_as_transformers_own(ranks, checkpoint_of, stages):
    """Measured: 0.80 to 1.07 times the error of transformers in bfloat16."""
    cases = [refilled(checkpoint_of(variant), stages) for variant in FAMILY]
    for case, outcome in zip(cases, ranks.run(*cases), strict=True):
        assert [len(tokens) for tokens in outcome.tokens()] == [row.max_tokens for row in case.groups[0].sequences]
        assert set(outcome.finish()) == {Finish.LENGTH}
        ours, theirs = errors(case, outcome)
        assert ours < 1.4 * theirs, case.label


@needs_openvino
def test_in_float32_they_are_exact(ranks, checkpoint_of):
    """As processors without bfloat16 arithmetic run them, quantized or not; of transformers' own error in bfloat16."""
    cases = [
        (refilled(checkpoint_of(variant), [(0, 2), (2, LAYERS)], bits, "float32"), tuple(bits or ()))
        for variant, bits in (("llama", None), ("bloom", None), ("qwen3", [4, 16, 8, 3, 4]))
    ]
    for (case, bits), outcome in zip(cases, ranks.run(*(case for case, _ in cases)), strict=True):
        ours, theirs = errors(case, outcome, bits)
        assert ours < 0.01 * theirs, case.label


@needs_openvino
def test_a_cache_of_8_bits_rounds_keys_and_values_alone(ranks, checkpoint_of):
    """In float32, on two stages whose slots refill; measured: 0.59 to 0.76 of transformers' own error
    in bfloat16."""
    paths = [checkpoint_of(variant) for variant in ("llama", "bloom", "qwen3", "mistral-window")]
    cases = [refilled(path, [(0, 2), (2, LAYERS)], dtype="float32", kv_bits=8) for path in paths]
    for case, outcome in zip(cases, ranks.run(*cases), strict=True):
        ours, theirs = errors(case, outcome)
        assert 0.01 * theirs < ours < 1.2 * theirs, case.label


@pytest.mark.parametrize("stages", [[(0, LAYERS)], [(0, 2), (2, LAYERS)]])
def test_chunks_pass_with_decode_rows(ranks, checkpoint_of, stages):
    """Five tokens of prompts a call: most prompts come in several, beside decode rows. As exact as whole prompts, and
    no more decode passes than when each phase passes alone."""
    path = checkpoint_of("llama")
    case = replace(refilled(path, stages, dtype="float32"), options={"prefill_tokens": 5})
    [outcome] = ranks.run(case)
    ours, theirs = errors(case, outcome)
    assert ours < 0.01 * theirs
    passes, prompts = outcome.stage(0)["passes"], [len(row.prompt) for row in case.groups[0].sequences]
    assert passes["prefill"] >= sum(prompts) / 5
    assert outcome.stage(0)["report"]["tokens"]["prefill"] == sum(prompts)


@needs_openvino
def test_a_shared_prefix_is_exact(ranks, checkpoint_of):
    """Blocks in all rows' tables, windows shorter than the prefix, and rows without it; as exact as whole prompts."""
    cases = []
    for variant in ("llama", "bloom", "mistral-window", "opt"):
        draw = Draw(seed=11)
        prefix = tuple(draw.random.randrange(3, 128) for _ in range(2 * CACHE_BLOCK))
        prompts = [(*prefix, *draw.prompt(20)) for _ in range(5)] + [draw.prompt(40), prefix]
        rows = tuple(
            Sequence(key, prompt, 3 + key, SamplingParams(ignore_eos=True)) for key, prompt in enumerate(prompts)
        )
        capacity = 3 * CACHE_BLOCK
        group, workload = RequestGroup(rows, SLOTS, capacity, joins=True), (SLOTS, 90, 30, len(prefix), capacity)
        plan = graph_plan(checkpoint_of(variant), [(0, 2), (2, LAYERS)], None, workload, "float32")
        cases.append(Case(checkpoint_of(variant), plan, (group,), logits=True, label=variant, prefix=prefix))
    for case, outcome in zip(cases, ranks.run(*cases), strict=True):
        ours, theirs = errors(case, outcome)
        assert ours < 0.01 * theirs, case.label
        computed = sum(len(row.prompt) for row in case.groups[0].sequences) - 4 * len(case.prefix)
        assert all(rank["report"]["tokens"]["prefill"] == computed for rank in outcome.ranks)


@needs_openvino
def test_quantized_stages(ranks, checkpoint_of):
    """Widths of all kinds. Transformers in bfloat16 runs HQQ's own forward, whose scales and weights are rounded; a
    graph rounds inputs to 8 bits instead: measured 0.37 and 0.46 times its error."""
    bits = [4, 16, 8, 3, 4]
    cases = [refilled(checkpoint_of(variant), [(0, 3), (3, LAYERS)], bits) for variant in ("llama", "qwen3")]
    for case, outcome in zip(cases, ranks.run(*cases), strict=True):
        ours, theirs = errors(case, outcome, tuple(bits))
        assert ours < 0.8 * theirs, case.label


@needs_openvino
def test_answers_that_outgrow_their_blocks_come_again(ranks, checkpoint_of):
    """Slots of 40 positions are two blocks; the answers need four."""
    path = checkpoint_of("llama")
    draw = Draw(seed=1)
    rows = tuple(Sequence(key, draw.prompt(20), 100, sampling=SamplingParams(ignore_eos=True)) for key in range(2))
    case = Case(path, graph_plan(path, [(0, LAYERS)]), (RequestGroup(rows, 2, 40),), logits=True, label="overrun")
    [outcome] = ranks.run(case)
    assert [len(tokens) for tokens in outcome.tokens()] == [100, 100]
    ours, theirs = errors(case, outcome)
    assert ours < 1.4 * theirs
