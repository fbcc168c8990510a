"""What a plan says of itself is true and in plain figures."""

import re

from brute_force import brute_force
from random_problems import random_problem

from ds_llmpq.errors import InfeasibleError
from ds_llmpq.planner import Problem, solve
from ds_llmpq.planner.explain import explain_plan
from ds_llmpq.wording import format_number, pluralize

WORTH = re.compile(r"objective of [^ ]+ s, with the same stages and other bit widths, by at least (.*)\.$")


def plans(seeds, **options):
    for seed in seeds:
        obj = random_problem(seed, mode="theta", **options)
        try:
            yield obj, solve(obj, solver="search", gap=0)
        except InfeasibleError:
            continue


def test_what_a_gigabyte_is_worth_is_there_to_gain():
    claims = 0
    for obj, plan in plans(range(60), layers=4, devices=2, widths=3):
        for sentence in plan.explanation:
            for entry in WORTH.findall(sentence):
                worth, name = re.match(r"([0-9.,]+) s on (\S+?)(,|$)", entry).groups()[:2]
                devices = [
                    {**device, "memory_bytes": device["memory_bytes"] + 1e9 * (device["name"] == name)}
                    for device in obj["devices"]
                ]
                more = solve({**obj, "devices": devices}, solver="search", gap=0)
                gain = plan.solver.objective - more.solver.objective
                assert 0 < float(worth.replace(",", "")) <= gain * 1.006 + 1e-12  # written to three digits
                claims += 1
    assert claims > 5


def test_sentences_hold_no_exponents_and_count_rightly():
    found = [sentence for _, plan in plans(range(20)) for sentence in plan.explanation]
    assert any("micro-batch" in sentence for sentence in found)
    for sentence in found:
        assert not re.search(r"\d[eE][+-]?\d", sentence)
        assert not re.search(r"(?<![\d.,])1 (layers|micro-batches|stages)", sentence)


def test_counted():
    assert [pluralize(n, "micro-batch") for n in (1, 2)] == ["1 micro-batch", "2 micro-batches"]
    assert [pluralize(n, "layer") for n in (1, 1000)] == ["1 layer", "1,000 layers"]


def roomy_plans(seeds):
    for seed in seeds:
        obj = random_problem(seed, mode="theta", layers=4, devices=2, widths=3)
        roomy = obj | {"devices": [device | {"memory_bytes": 10**15} for device in obj["devices"]]}
        yield roomy, solve(roomy, solver="search", gap=0)


def test_the_first_sentence_says_what_is_quantized_and_whether_memory_asked_for_it():
    seen = set()
    for obj, plan in [*plans(range(30), layers=4, devices=2, widths=3), *roomy_plans(range(30))]:
        bits = [width for stage in plan.stages for width in stage.bits]
        low = sum(width < 16 for width in bits)
        sentence = plan.explanation[0]
        if low == 0:
            assert sentence == f"Nothing is quantized: all {len(bits)} layers stay at 16 bits."
            seen.add("nothing")
            continue
        assert sentence.startswith(f"Quantized: {low} of {len(bits)} layers (")
        if 16 not in obj["bits"]:
            assert "because 16 bits are not among the choices; expected to cost " in sentence
            continue
        types = {
            name: kind | {"bits": [b for b in kind["bits"] if b == 16]} for name, kind in obj["device_types"].items()
        }
        short = brute_force(obj | {"device_types": types, "objective": {"mode": "theta", "theta": 0.0}}) is None
        why = "do not fit the devices' memory otherwise" if short else "that is faster"
        loss = plan.predicted.quality_loss
        cost = "under 0.0001" if 0 < loss < 1e-4 else format_number(loss)
        assert f"{why}; expected to cost {cost} nats a token, " in sentence
        seen.add(bool(short))
    assert seen == {"nothing", True, False}


def test_low_bits_that_gain_no_time_are_named_once():
    said = 0
    for obj, plan in plans(range(40), layers=4, devices=2, widths=3):
        size, slow = str(plan.micro_batch.decode), set()
        for stage in plan.stages:
            times = obj["device_types"][stage.device_type]["decode_layer_seconds"]
            if times.get("16", {}).get(size) is not None:
                low = {bits for bits in stage.bits if bits < 16 and times[str(bits)][size] >= times["16"][size]}
                slow |= {(bits, stage.device_type) for bits in low}
        found = [sentence for sentence in plan.explanation if "low bits save memory, but no time" in sentence]
        assert len(found) == bool(slow)
        said += len(found)
        for bits, kind in slow:
            assert re.search(rf"{bits} bits take [1-9][0-9]*\.[0-9]+ times as long as 16 on {kind}\b", found[0])
    assert said


def test_a_plan_that_may_lose_less_than_it_does_says_so():
    """As a baseline that heeds no bound."""
    said = set()
    for obj, plan in plans(range(30), layers=4, devices=2, widths=3):
        loss = plan.predicted.quality_loss
        if loss > 0:
            for limit in (2 * loss, loss / 2):
                bound = {"mode": "max_quality_loss", "limit": limit}
                sentence = explain_plan(Problem.from_json(obj | {"objective": bound}), plan)[0]
                over = f", more than the {format_number(limit)} that are allowed, "
                assert (over in sentence) == (limit < loss)
                assert (f" of the {format_number(limit)} allowed, " in sentence) == (limit > loss)
                said.add(limit < loss)
    assert said == {True, False}
