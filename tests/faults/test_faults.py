"""Faults in real runs: whatever happens, no result is lost or doubled, and greedy texts are those of a quiet run.

More of the same, at random: `python scripts/fault_runs.py`.
"""

import json
import os
import resource
import signal
import subprocess
import time

import pytest
from harness import PRECISE, TWO_STAGES, FaultRun, find_victim, rows_in, rows_of, undisturbed, write_input

# the harness has put the folder of these on the path
from launching import Command, completion, error_sentence, gone, wait_for_results, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.launcher]


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    return write_input(tmp_path_factory.mktemp("batch") / "rows.jsonl")


@pytest.fixture(scope="module")
def expected(tmp_path_factory, batch):
    return undisturbed(tmp_path_factory.mktemp("undisturbed"), batch)


def test_after_a_kill_nothing_is_lost(batch, expected, tmp_path, monkeypatch):
    """And that where every process sees a wall clock that leaps: bounds and pauses go by the one that cannot."""
    (tmp_path / "sitecustomize.py").write_text(
        "import itertools, time\n"
        "real, calls = time.time, itertools.count()\n"
        "time.time = lambda: real() + (86400 if next(calls) % 2 else -86400)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = FaultRun(tmp_path, batch, "rank 1", 60, 0.0)
    assert run.go() == 1
    assert rows_of(run.out) == expected
    metrics = json.loads((run.out / "metrics.json").read_text())
    assert metrics["restarts"]["restarts"] == 1
    assert 0 < metrics["gone_on_from"]["rows"] <= metrics["gone_on_from"]["tokens"]
    assert not (run.out / "in_flight.jsonl").exists()


def test_after_a_kill_of_run_itself_the_same_command_goes_on(batch, expected, tmp_path):
    run = FaultRun(tmp_path, batch, "run", 120, 0.0)
    assert run.go() == 2
    assert rows_of(run.out) == expected
    assert json.loads((run.out / "run.json").read_text())["state"] == "finished"
    again = run.command().run()
    assert again.returncode == 0
    assert "nothing is left to do" in again.stdout
    results = run.out / "results.jsonl"
    results.write_bytes(b"".join(results.read_bytes().splitlines(keepends=True)[:-2]))
    again = run.command().run()
    assert again.returncode == 0
    assert f"was finished, but 2 of its {len(expected)} rows are gone; serving what is missing" in again.stdout
    assert rows_of(run.out) == expected


def test_results_deleted_while_they_are_written_are_missed_and_made_again(batch, expected, tmp_path):
    run = FaultRun(tmp_path, batch, "run", 0, 0.0)
    command = run.command()
    process = command.start()
    try:
        wait_for_results(run.out / "results.jsonl", process)
        (run.out / "results.jsonl").unlink()
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    sentence = error_sentence(subprocess.CompletedProcess([], process.returncode, out, err))
    assert "results.jsonl was deleted, replaced or cut" in sentence
    assert json.loads((run.out / "failure.json").read_text())["failure"]["kind"] == "mistake"
    assert json.loads((run.out / "run.json").read_text())["state"] == "unfinished"
    assert gone(command.processes)
    assert run.command().run().returncode == 0
    assert rows_of(run.out) == expected
    assert not (run.out / "failure.json").exists()


def test_a_stopped_rank_is_noticed_and_its_stacks_are_in_the_log(batch, expected, tmp_path):
    run = FaultRun(tmp_path, batch, "rank 1", 8, 0.0, signal.SIGSTOP, ("run.hang_seconds=8",))
    assert run.go() == 1
    assert rows_of(run.out) == expected
    log = (run.out / "launcher.log").read_text()
    assert log.count("most recent call first") >= 2
    assert "nothing moved for 8 s" in json.loads((run.out / "metrics.json").read_text())["restarts"]["reasons"][0]


def test_an_evaluation_that_hangs_is_one_sentence(tmp_path):
    text = tmp_path / "text.py"  # minutes of scoring
    text.write_text("def one(value):\n    return value + 1\n" * 50_000)
    own = ("run.hang_seconds=8", "evaluation.reference=false", f"evaluation.text={text}")
    command = Command(("evaluate", f"out={tmp_path}", TWO_STAGES, *own, *PRECISE))
    process = command.start()
    try:
        while (rank := find_victim("rank 1", process, command)) is None:
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(12)  # if it has not begun by then, the hang is noticed after two minutes instead
        rank.send_signal(signal.SIGSTOP)
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
        process.communicate()
    sentence = error_sentence(subprocess.CompletedProcess([], process.returncode, out, err))
    # where scoring has not begun after 12 s, the stopped process is noticed before the silence
    assert "Nothing moved for 8 s" in sentence or "A process was stopped" in sentence
    assert "most recent call first" in (tmp_path / "launcher.log").read_text()
    assert gone(command.processes)


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(batch, expected, tmp_path):
    """Rank 0 may no longer make files longer than they are: to it, that is a full disk."""
    run = FaultRun(tmp_path, batch, "rank 0", 40, 0.0)
    results = run.out / "results.jsonl"
    command = run.command()
    process = command.start()
    try:
        wait_for_results(results, process)
        rank = find_victim("rank 0", process, command)
        resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (results.stat().st_size + 100,) * 2)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    sentence = error_sentence(subprocess.CompletedProcess([], process.returncode, out, err))
    assert "results.jsonl" in sentence
    assert "free some space and run again" in sentence
    kept = rows_of(run.out)
    assert 0 < len(kept) < len(expected)
    assert gone(command.processes)
    assert run.command().run().returncode == 0
    assert rows_of(run.out) == expected


def test_without_memory_it_goes_on_with_less_at_a_time(tmp_path):
    """A rank may take no more address space than it has, and each wave's prompts are longer than the last one's."""
    batch = write_input(tmp_path / "rows.jsonl", requests=160, longest=5, growth=5)
    options = ("workload.sequences=32", "planner.micro_batches.prefill=[16]", "planner.micro_batches.decode=[16]")
    expected = undisturbed(tmp_path / "quiet", batch, *options)
    run = FaultRun(tmp_path, batch, "rank 1", 20, 0.0, options=options)
    command = run.command()
    process = command.start()
    try:
        wait_for_results(run.out / "results.jsonl", process)
        victim = find_victim("rank 1", process, command)
        resource.prlimit(victim.pid, resource.RLIMIT_AS, (victim.memory_info().vms, resource.RLIM_INFINITY))
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, err
    assert rows_of(run.out) == expected
    metrics = json.loads((run.out / "metrics.json").read_text())
    assert metrics["memory_warnings"] or metrics["restarts"]["restarts"]  # a thread that cannot start names no reason
    assert bool(metrics["memory_warnings"]) == ("memory ran out" in out)


def test_sigterm_drains_and_the_same_command_goes_on(batch, expected, tmp_path):
    run = FaultRun(tmp_path, batch, "run", 40, 0.0)
    command = run.command()
    process = command.start()
    assert run.strike_with(signal.SIGTERM, process, command)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "resumes there" in error_sentence(subprocess.CompletedProcess([], 130, out, err))
    assert gone(command.processes)
    assert json.loads((run.out / "run.json").read_text())["attempts"][-1]["reason"] == "drained"
    kept = rows_of(run.out)
    assert 40 <= len(kept) <= len(expected)
    changed = Command((*command.arguments, "batch.temperature=0.5")).run()
    assert "batch.temperature (0.0, now 0.5)" in error_sentence(changed)
    assert run.command().run().returncode == 0
    assert rows_of(run.out) == expected


def test_an_output_that_cannot_be_written_is_one_sentence(tmp_path):
    """A mount that may only be read, in a namespace of its own."""
    out = tmp_path / "out"
    out.mkdir()
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", mount, str(out))
    if os.geteuid() != 0 or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces need root")
    rows = write_rows(tmp_path / "rows.jsonl", [completion("a", "x")])
    ended = Command(("run", f"input={rows}", f"out={out}", TWO_STAGES, *PRECISE), prefix=prefix).run()
    assert str(out) in error_sentence(ended)
    assert rows_in(out / "results.jsonl") == 0
