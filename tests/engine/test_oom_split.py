"""Passes that memory has no room for: made in parts, with the same tokens, and only where it must be."""

import subprocess
import sys

import pytest
import torch
from pipeline_cases import LAYERS, Case, make_plan, reference
from test_finish import prompts_of, rows_of

from ds_llmpq.engine.stage_run.oom_split import MicroBatchSplitter
from ds_llmpq.launch.failures import is_out_of_memory
from ds_llmpq.models.step import Step
from ds_llmpq.scheduler.request_group import RequestGroup
from ds_llmpq.scheduler.slot_table import Finish

THREE = [(0, 2), (2, 3), (3, LAYERS)]


@pytest.fixture(scope="module")
def llama(checkpoint_of):
    return checkpoint_of("llama")


def greedy(path, prompts, limit):
    return [reference(path).generate([prompt], limit)[0] for prompt in prompts]


def worked(room, rows, tokens=1):
    """What `MicroBatchSplitter` asks for, with room for so many tokens: spans that were done, and the warnings."""
    done = []

    def work(start, stop):
        if (stop - start) * tokens > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.append((start, stop))
        return start

    parts = MicroBatchSplitter(1, torch.device("cpu"))
    assert parts.run("decode", rows, tokens, work) == [start for start, _ in done]
    return parts, done


def test_all_at_once_while_there_is_room():
    parts, done = worked(room=8, rows=8)
    assert (done, parts.warnings) == ([(0, 8)], [])


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("room", [1, 2, 3, 7])
def test_every_row_once_in_order(rows, room):
    parts, done = worked(room, rows)
    assert [row for start, stop in done for row in range(start, stop)] == list(range(rows))
    assert max(stop - start for start, stop in done) <= room
    assert [warning["rows_now"] for warning in parts.warnings] == [warning["rows"] // 2 for warning in parts.warnings]
    assert bool(parts.warnings) == (rows > room)


def test_it_does_not_try_again_what_failed():
    parts, _ = worked(room=4, rows=16, tokens=2)
    count, spans = len(parts.warnings), []
    parts.run("decode", 6, 2, lambda start, stop: spans.append((start, stop)))
    assert spans == [(0, 2), (2, 4), (4, 6)]
    assert len(parts.warnings) == count
    spans.clear()
    parts.run("prefill", 6, 2, lambda start, stop: spans.append((start, stop)))
    assert spans == [(0, 6)]  # another phase, another workspace


def test_other_errors_and_single_rows_pass_on():
    parts = MicroBatchSplitter(0, torch.device("cpu"))

    def failing(error):
        def work(start, stop):
            raise error

        return work

    with pytest.raises(RuntimeError, match="shapes"):
        parts.run("decode", 4, 1, failing(RuntimeError("shapes do not match")))
    assert parts.warnings == []
    with pytest.raises(MemoryError):
        parts.run("decode", 4, 1, failing(MemoryError()))
    assert [warning["rows_now"] for warning in parts.warnings] == [2, 1]


def test_torch_says_it_ran_out():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.int8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_step_of_some_rows():
    step = Step(
        positions=torch.arange(12).view(4, 3), cache=None, kv_tokens=3, causal_only=True,
        hidden=torch.arange(24.0).view(4, 3, 2), last=torch.tensor([0, 1, 2, 1]),
    )  # fmt: skip
    part = step.rows(1, 3)
    assert part.positions.tolist() == [[3, 4, 5], [6, 7, 8]]
    assert part.at_last().tolist() == step.at_last()[1:3].tolist()
    assert part.token_ids is None


@pytest.mark.parametrize("short", [{0: 9}, {1: 12}, {2: 10}, {0: 24, 1: 9, 2: 12}])
def test_the_same_tokens_with_less_memory(ranks, llama, short):
    """Any stage, or all of them to different degrees: in prefill, decode and with the head."""
    prompts = prompts_of([9, 4, 2, 7, 8, 1])
    plan = make_plan(llama, THREE, micro_batch=(6, 6), workload=(6, 9, 8))
    [out] = ranks.run(Case(llama, plan, (RequestGroup(rows_of(prompts, 8)),), room=short))
    assert out.tokens() == greedy(llama, prompts, 8)
    for stage in range(3):
        warned = out.stage(stage)["report"]["memory_warnings"]
        assert bool(warned) == (stage in short)
        assert all(warning["stage"] == stage for warning in warned)


def test_decode_in_parts(ranks, llama):
    prompts = prompts_of([3, 2, 3, 1, 2])
    plan = make_plan(llama, THREE, micro_batch=(1, 5), workload=(5, 3, 9))
    [out] = ranks.run(Case(llama, plan, (RequestGroup(rows_of(prompts, 9)),), room={1: 3}))
    assert out.tokens() == greedy(llama, prompts, 9)
    [warning] = out.stage(1)["report"]["memory_warnings"]
    assert (warning["phase"], warning["rows"], warning["rows_now"]) == ("decode", 5, 2)


def test_a_prompt_longer_than_planned_takes_no_more_room(ranks, llama):
    """It passes in chunks of what was planned, 15 tokens."""
    prompts = prompts_of([4, 43, 3])
    plan = make_plan(llama, THREE, micro_batch=(3, 3), workload=(3, 5, 46))
    [out] = ranks.run(Case(llama, plan, (RequestGroup(rows_of(prompts, 6)),), room={0: 15, 1: 15, 2: 15}))
    assert out.tokens() == greedy(llama, prompts, 6)
    assert not any(rank["report"]["memory_warnings"] for rank in out.ranks)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_prompt_longer_than_planned_harms_no_other(ranks, llama, stage):
    """Whose chunks have no room either: it ends as broken; a later group in its slot is untouched."""
    prompts, later = prompts_of([4, 23, 3]), prompts_of([2, 4, 3], seed=3)
    plan = make_plan(llama, THREE, micro_batch=(1, 3), workload=(3, 5, 26))
    case = Case(llama, plan, (RequestGroup(rows_of(prompts, 6)), RequestGroup(rows_of(later, 6))), room={stage: 4})
    [out] = ranks.run(case)
    assert out.finish(0) == [Finish.LENGTH, Finish.NAN_LOGITS, Finish.LENGTH]
    assert [out.tokens(0)[row] for row in (0, 2)] == greedy(llama, [prompts[0], prompts[2]], 6)
    assert out.tokens(1) == greedy(llama, later, 6)
    assert [warning["rows_now"] for warning in out.stage(stage)["report"]["memory_warnings"]] == [0]


REAL = """
import resource, sys, torch
from ds_llmpq.engine.stage_run.oom_split import MicroBatchSplitter
from ds_llmpq.engine import device_memory
torch.set_num_threads(1)
weight = torch.randn(64, 64)
wide = torch.randn(64, 40_000)
values = torch.randn(1024, 64)

def work(start, stop):
    return (values[start:stop] @ wide).relu() @ wide.T   # 160 KB a row in between

wanted = torch.cat([work(start, start + 64) for start in range(0, 1024, 64)])
device_memory.release_freed()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (60 << 20), resource.RLIM_INFINITY))
parts = MicroBatchSplitter(0, torch.device("cpu"))
found = torch.cat(parts.run("prefill", 1024, 1, work))
assert parts.warnings, "there was room"
assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-3)
print(parts.warnings[-1]["rows_now"])
"""


def test_an_allocator_that_really_refuses():
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 1 <= int(done.stdout) <= 512  # how many depends on what else the process has reserved
    assert "ran out of memory in prefill of 1,024 rows" in done.stderr
