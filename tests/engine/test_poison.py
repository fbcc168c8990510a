"""Rows whose pass raises, on any stage and in any phase: they alone are given up, and the reason reaches the driver."""

import pytest
import torch
from pipeline_cases import LAYERS, Case, make_plan
from test_finish import prompts_of, rows_of
from test_graph_pipeline import graph_plan, needs_openvino
from test_oom_split import THREE, greedy

from ds_llmpq.engine.stage_run.faults import FaultLog, Suspects, describe_error, find_first_faults
from ds_llmpq.engine.stage_run.oom_split import MicroBatchSplitter
from ds_llmpq.scheduler.request_group import RequestGroup
from ds_llmpq.scheduler.sampling_params import SamplingParams
from ds_llmpq.scheduler.slot_table import Finish

ONE, TWO = [(0, LAYERS)], [(0, 2), (2, LAYERS)]
PROMPTS = [6, 3, 9, 4, 2, 7, 5, 8]
LIMIT = 8


@pytest.fixture(scope="module")
def llama(checkpoint_of):
    return checkpoint_of("llama")


def poisoned(path, stages, keys, poison, micro_batch=(4, 4), **case):
    """Eight rows in as many slots; `keys` are the poisoned ones, by (stage, generated, where)."""
    plan = make_plan(path, stages, micro_batch=micro_batch, workload=(8, 9, LIMIT))
    rows = rows_of(prompts_of(PROMPTS), LIMIT)
    entries = tuple(
        {"stage": stage, "keys": keys, "generated": after, "where": where} for stage, after, where in poison
    )
    return Case(path, plan, (RequestGroup(rows),), poison=entries, label=f"{len(stages)} {poison}", **case)


def check(out, path, keys, stage, phase, generated):
    wanted = greedy(path, prompts_of(PROMPTS), LIMIT)
    for row, (tokens, finish) in enumerate(zip(out.tokens(), out.finish(), strict=True)):
        if row in keys:
            assert finish is Finish.NAN_LOGITS
            assert tokens[:-1] == wanted[row][:generated]
        else:
            assert (finish, tokens) == (Finish.LENGTH, wanted[row])
    faults = out.faults()
    assert sorted(faults) == sorted(keys)
    for fault in faults.values():
        assert (fault["stage"], fault["phase"], fault["kind"]) == (stage, phase, "LookupError")


PLACES = [
    (stages, stage, where)
    for stages in (ONE, TWO, THREE)
    for stage in range(len(stages))
    for where in ("first layer", "last layer")
]


@pytest.mark.parametrize("keys", [[2], [1, 2], [0, 7], list(range(8))], ids=str)
@pytest.mark.parametrize(("generated", "phase"), [(0, "prefill"), (3, "decode")])
def test_the_poisoned_rows_alone_are_given_up(ranks, llama, generated, phase, keys):
    for stages in (ONE, TWO, THREE):
        places = [place for place in PLACES if place[0] is stages]
        cases = [poisoned(llama, stages, keys, [(stage, generated, where)]) for _, stage, where in places]
        for (_, stage, _), out in zip(places, ranks.run(*cases), strict=True):
            check(out, llama, keys, stage, phase, generated)


@pytest.mark.parametrize("stages", [ONE, TWO])
def test_while_sampling(ranks, llama, stages):
    last = len(stages) - 1
    cases = [poisoned(llama, stages, [1, 6], [(last, after, "sampling")]) for after in (0, 2)]
    for after, out in zip((0, 2), ranks.run(*cases), strict=True):
        check(out, llama, [1, 6], last, "sampling", after)


def test_the_first_stage_that_fails_is_named(ranks, llama):
    [out] = ranks.run(poisoned(llama, THREE, [3], [(1, 2, "first layer"), (2, 0, "last layer")]))
    check(out, llama, [3], 2, "prefill", 0)
    [out] = ranks.run(poisoned(llama, THREE, [3], [(1, 2, "first layer"), (2, 2, "last layer")]))
    check(out, llama, [3], 1, "decode", 2)


def test_rows_that_come_later_are_served_from_the_same_slots(ranks, llama):
    """Twenty rows through four slots; the slots of the poisoned ones are used again."""
    prompts, bad = prompts_of([3 + key % 7 for key in range(20)]), [0, 1, 9]
    plan = make_plan(llama, TWO, micro_batch=(2, 2), workload=(4, 9, LIMIT))
    group = RequestGroup(rows_of(prompts, LIMIT), 4, 9 + LIMIT, joins=True)
    poison = ({"stage": 1, "keys": bad, "generated": 1},)
    [out] = ranks.run(Case(llama, plan, (group,), poison=poison))
    wanted = greedy(llama, prompts, LIMIT)
    for row, tokens in enumerate(out.tokens()):
        assert (row in bad) or tokens == wanted[row]
    assert [row for row, finish in enumerate(out.finish()) if finish is Finish.NAN_LOGITS] == bad
    assert sorted(out.faults()) == bad


@pytest.mark.parametrize("options", [{}, {"batch_invariant": True}], ids=str)
def test_sound_rows_have_the_logits_of_a_quiet_run(ranks, llama, options):
    """To the bit: the pass is made once more in its own shape. The poison is a token that one row alone brings to the
    last decode pass, so all passes are those of the quiet run."""
    quiet = poisoned(llama, TWO, [], [], logits=True, options=options)
    [expected] = ranks.run(quiet)
    texts = [prompt + tuple(tokens[:-1]) for prompt, tokens in zip(prompts_of(PROMPTS), expected.tokens(), strict=True)]
    brought = [token for text in texts for token in text]
    bad = next(row for row, text in enumerate(texts) if brought.count(text[-1]) == 1)
    [found] = ranks.run(poisoned(llama, TWO, [texts[bad][-1]], [(0, 0, "tokens")], logits=True, options=options))
    assert list(found.faults()) == [bad]

    def sound(outcome):
        values = {(key, step): tuple(row) for key, step, row in outcome.stage(1)["logits"]}
        return {place: row for place, row in values.items() if place[0] != bad}

    assert len(sound(expected)) == 7 * LIMIT
    assert sound(found) == sound(expected)


def test_sampled_rows(ranks, llama):
    sampling = SamplingParams(0.9, top_p=0.9, seed=11)
    plan = make_plan(llama, TWO, micro_batch=(4, 4), workload=(8, 9, LIMIT))
    group = RequestGroup(rows_of(prompts_of(PROMPTS), LIMIT, sampling=sampling))
    poison = ({"stage": 0, "keys": [4], "generated": LIMIT - 1},)
    quiet, loud = ranks.run(Case(llama, plan, (group,)), Case(llama, plan, (group,), poison=poison))
    assert quiet.tokens()[:4] + quiet.tokens()[5:] == loud.tokens()[:4] + loud.tokens()[5:]


@pytest.mark.parametrize("stages", [ONE, TWO])
@pytest.mark.parametrize("stage", [0, -1])
def test_what_raises_for_every_row_is_not_blamed_on_rows(ranks, llama, stages, stage):
    case = poisoned(llama, stages, [], [(range(len(stages))[stage], 0, "last layer")])
    reply = ranks.reply(case, expect_death=True)
    assert "LookupError: no" in reply["problem"]


@needs_openvino
@pytest.mark.parametrize("stages", [ONE, TWO])
@pytest.mark.parametrize("generated", [0, 3])
def test_stages_that_are_graphs(ranks, llama, stages, generated):
    group = RequestGroup(rows_of(prompts_of(PROMPTS), LIMIT))
    plan = graph_plan(llama, stages, workload=(8, 9, LIMIT))
    for stage in range(len(stages)):
        poison = ({"stage": stage, "keys": [1, 4], "generated": generated, "where": "last layer"},)
        quiet, out = ranks.run(Case(llama, plan, (group,)), Case(llama, plan, (group,), poison=poison))
        assert [row for row, finish in enumerate(out.finish()) if finish is Finish.NAN_LOGITS] == [1, 4]
        assert sorted(out.faults()) == [1, 4]
        for row in (0, 2, 3, 5, 6, 7):
            assert len(out.tokens()[row]) == LIMIT
            assert out.tokens()[row][: generated + 1] == quiet.tokens()[row][: generated + 1]


class Rows:
    """Work over rows of which some raise."""

    def __init__(self, bad, always=False):
        self.bad, self.always, self.calls = set(bad), always, 0

    def work(self, start, stop):
        self.calls += 1
        if self.always or self.bad & set(range(start, stop)):
            raise KeyError("bad")
        return list(range(start, stop))

    def neutral(self):
        if self.always:
            raise KeyError("bad")


@pytest.mark.parametrize("bad", [[], [0], [6], [2, 3], [0, 3, 6], range(7)], ids=str)
def test_halves(bad):
    rows = Rows(bad)
    suspects = Suspects(rows.neutral, lambda: ["none"])
    found = MicroBatchSplitter(0, torch.device("cpu")).run("decode", 7, 1, rows.work, suspects)
    flat = [row for part in found for row in part]
    assert flat == ["none" if row in set(bad) else row for row in range(7)]
    assert sorted(suspects.failed) == sorted(bad)
    assert rows.calls <= 1 + 6 * max(1, len(bad))


def test_memory_and_poison_together():
    """Room for two rows, and one of five raises."""

    def work(start, stop):
        if stop - start > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Rows([3]).work(start, stop)

    suspects = Suspects(lambda: None, lambda: ["none"])
    parts = MicroBatchSplitter(0, torch.device("cpu"))
    found = parts.run("decode", 5, 1, work, suspects)
    assert [row for part in found for row in part] == [0, 1, 2, "none", 4]
    assert [warning["rows_now"] for warning in parts.warnings] == [2]


def test_the_exception_itself_ends_a_stage_that_runs_no_row():
    rows = Rows([], always=True)
    with pytest.raises(KeyError, match="bad"):
        MicroBatchSplitter(0, torch.device("cpu")).run("decode", 64, 1, rows.work, Suspects(rows.neutral, list))
    assert rows.calls == 1  # it is not tried row by row


def test_messages_are_printable_and_short():
    assert describe_error(ValueError("a\x1b[31m\nb\u2028c\x85" + "x" * 5000)).startswith(
        "a\\x1b[31m\\nb\\u2028c\\x85xxx"
    )
    assert describe_error(ValueError("a\nb")) == "a\\nb"
    assert len(describe_error(ValueError("\x00" * 5000))) <= 300
    assert describe_error(ValueError("shapes do not match")) == "shapes do not match"
    lone = describe_error(ValueError("\ud800"))
    assert lone.encode()


def test_a_fault_is_that_of_the_first_stage():
    def fault(stage):
        return {"stage": stage, "phase": "decode", "kind": "ValueError", "message": "", "out_of_memory": False}

    found = find_first_faults([[[7, fault(2)]], [[7, fault(1)], [8, fault(1)]]])
    assert {key: each.stage for key, each in found.items()} == {7: 1, 8: 1}


def test_a_fault_is_kept_until_its_own_row_is_asked_for(capsys):
    """Another row's fault is asked for first, as when that one ends while this one's prompt still passes in chunks."""
    faults = FaultLog(1)
    faults.note(7, "prefill", ValueError("seven"))
    faults.note(8, "decode", ValueError("eight"))
    assert [key for key, _ in faults.take([8, 9])] == [8]
    assert 7 in faults
    assert 8 not in faults
    [[key, fault]] = faults.take([7])
    assert (key, fault["message"]) == (7, "seven")
