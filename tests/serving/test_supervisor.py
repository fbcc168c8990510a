"""When a batch is started again, when not, and what is planned when devices stay away; the launcher is a stand-in."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.batch.results import Tally
from ds_llmpq.engine.config import EngineConfig
from ds_llmpq.errors import Interrupted, RunFailed, UserError
from ds_llmpq.launch import attempt
from ds_llmpq.launch.attempt import MISTAKE, Outcome, run_attempt
from ds_llmpq.launch.config import SupervisionConfig, validate_supervision
from ds_llmpq.launch.failures import CONNECTION, EXCEPTION, FAULT, MEMORY, PORT, Failure
from ds_llmpq.launch.journal import Identity, Journal
from ds_llmpq.launch.process_monitor import Exit, ExitReason
from ds_llmpq.launch.progress import ERROR_MARK
from ds_llmpq.plan import MicroBatches, Plan, PredictedTotals, Workload
from ds_llmpq.serving.job import Job
from ds_llmpq.serving.supervisor import Supervisor

DIED, HUNG, ENDED = Exit(ExitReason.DIED, -9), Exit(ExitReason.HUNG, None), Exit(ExitReason.ENDED, 0)
DRAINED = Exit(ExitReason.DRAINED, 0)
ROWS = 12


def failure(kind, message="boom", rank=1):
    return Failure(kind, "RuntimeError", message, rank, file="ds_llmpq/x.py", line=3, function="work")


class Scene:
    """A pipeline for twelve rows that ends as told: (how, results that are there then, what a rank named)."""

    def __init__(self, tmp_path, monkeypatch, *ends, lost=(), **settings):
        self.ends, self.lost, self.pauses, self.replanned = list(ends), list(lost), [], []
        self.results = 0
        monkeypatch.setattr(Supervisor, "_start", lambda supervisor: self.attempt())
        job = SimpleNamespace(output=str(tmp_path), plan="plan")
        self.supervisor = Supervisor(
            job, SimpleNamespace(folder=tmp_path, hosts=("localhost",)),
            SupervisionConfig(backoff_seconds=1.0, **settings), Journal(Identity("a", "b", "c", {})),
            lambda: Tally(ROWS, self.results, 0, ROWS - self.results), self.replan,
            find_lost=lambda plan: self.lost.pop(0) if self.lost else [], pause=self.pauses.append,
        )  # fmt: skip

    def attempt(self):
        how, self.results, *named = self.ends.pop(0)
        named = named[0] if named else None
        return Outcome(how, named, named is not None and named.kind == MEMORY)

    def replan(self, lost):
        self.replanned.append(lost)
        return replace_plan(self.supervisor.job), self.supervisor.launch


def replace_plan(job):
    return SimpleNamespace(output=job.output, plan="smaller plan")


def test_a_death_is_followed_by_a_restart_that_goes_on(tmp_path, monkeypatch):
    scene = Scene(tmp_path, monkeypatch, (DIED, 5), (HUNG, 9), (ENDED, 12))
    assert scene.supervisor.run().complete
    assert scene.supervisor.restarts == 2
    assert scene.pauses == [1.0, 1.0]  # each start brought results, so the count begins anew
    assert [attempt.results for attempt in Journal.read(tmp_path).attempts] == [5, 9, 0]
    assert "nothing moved" in scene.supervisor.reasons[1]


def test_restarts_that_bring_nothing_are_bounded_and_further_apart(tmp_path, monkeypatch):
    scene = Scene(tmp_path, monkeypatch, *[(DIED, 4)] * 9, restarts=3)
    with pytest.raises(UserError, match="3 restarts in a row brought no result"):
        scene.supervisor.run()
    assert scene.pauses == [1.0, 2.0, 4.0]
    assert len(scene.ends) == 9 - 4


def test_no_restart_where_none_is_wanted(tmp_path, monkeypatch):
    scene = Scene(tmp_path, monkeypatch, (DIED, 4), restarts=0)
    with pytest.raises(UserError, match="what finished is kept in"):
        scene.supervisor.run()
    assert scene.pauses == []


def test_a_mistake_is_not_tried_again(tmp_path, monkeypatch):
    scene = Scene(tmp_path, monkeypatch, (DIED, 0, failure(MISTAKE, "No space left.")))
    with pytest.raises(UserError, match="No space left"):
        scene.supervisor.run()
    assert Journal.read(tmp_path).attempts[-1].reason == "mistake: No space left."


def test_a_drained_run_is_interrupted_and_says_how_to_go_on(tmp_path, monkeypatch):
    with pytest.raises(Interrupted, match=f"the same command with out={tmp_path} resumes"):
        Scene(tmp_path, monkeypatch, (DRAINED, 3)).supervisor.run()


def test_a_device_that_comes_back_is_waited_for(tmp_path, monkeypatch):
    scene = Scene(tmp_path, monkeypatch, (DIED, 5), (ENDED, 12), lost=[["b:0"], ["b:0"], []], on_loss="replan")
    scene.supervisor.run()
    assert scene.pauses == [1.0, 2.0, 4.0]
    assert scene.replanned == []


def in_flight(scene):
    return scene.supervisor.job.plan.workload.sequences


def with_plan(scene, sequences):
    workload = Workload(sequences, 16, 8)
    plan = Plan(None, workload, (), MicroBatches(3, sequences // 2), PredictedTotals(0.0, 0.0, 0.0, 0.0, 0.0), None)
    scene.supervisor.job = Job(plan, "m", "i", scene.supervisor.job.output, EngineConfig(), BatchConfig())
    return scene


def test_out_of_memory_goes_on_with_fewer_in_flight(tmp_path, monkeypatch):
    ends = (DIED, 5, failure(MEMORY)), (DIED, 5), (DIED, 6, failure(MEMORY)), (ENDED, 12)
    scene = with_plan(Scene(tmp_path, monkeypatch, *ends), 8)
    scene.supervisor.run()
    assert in_flight(scene) == 2  # a death of another kind changes nothing
    assert scene.supervisor.job.plan.micro_batch == MicroBatches(1, 1)
    found = [(entry["sequences"], entry["sequences_now"]) for entry in scene.supervisor.memory_warnings]
    assert found == [(8, 4), (4, 2)]
    assert scene.supervisor.reasons[0] == "the pipeline ran out of memory"
    assert Journal.read(tmp_path).attempts[0].reason == "the pipeline ran out of memory"


def test_one_sequence_is_the_fewest(tmp_path, monkeypatch):
    ends = [(DIED, 4, failure(MEMORY))] * 9
    scene = with_plan(Scene(tmp_path, monkeypatch, *ends, restarts=3), 2)
    with pytest.raises(UserError, match="ran out of memory and 3 restarts in a row brought no result"):
        scene.supervisor.run()
    assert in_flight(scene) == 1
    assert len(scene.supervisor.memory_warnings) == 1


@pytest.mark.parametrize(
    ("said", "killed", "wanted"),
    [(failure(MEMORY), 0, True), (None, 1, True), (failure(EXCEPTION), 0, False)],
)
def test_what_counts_as_out_of_memory(tmp_path, monkeypatch, said, killed, wanted):
    """A rank's word, or the kernel's count of what it killed."""
    assert heard(tmp_path, monkeypatch, [said.to_line() if said else "text\n"], killed).ran_out == wanted


def hear(tmp_path, monkeypatch, *starts, killed=0, ended=DIED):
    """What is made of the lines of starts, one after another."""
    kills, starts = iter([3, 3 + killed] * len(starts)), list(starts)

    def read(launch, arguments, watch, mark):
        for line in starts.pop(0):
            watch.on_line(line.rstrip("\n"))
        return ended

    monkeypatch.setattr(attempt, "run_launcher", read)
    monkeypatch.setattr(attempt, "count_memory_kills", lambda: next(kills))
    return run_attempt(SimpleNamespace(folder=tmp_path), "job", 900.0, 60.0), len(starts)


def heard(tmp_path, monkeypatch, lines, killed=0, ended=DIED):
    return hear(tmp_path, monkeypatch, lines, killed=killed, ended=ended)[0]


def test_the_cause_is_what_is_no_lost_connection(tmp_path, monkeypatch):
    said = [failure(CONNECTION, rank=0), failure(EXCEPTION, "the cause", rank=1), failure(FAULT, "later", rank=2)]
    outcome = heard(tmp_path, monkeypatch, ["host: " + each.to_line() for each in said])
    assert outcome.failure.message == "the cause"
    assert (
        heard(tmp_path, monkeypatch, [said[0].to_line(), f"x {ERROR_MARK}No space.\n"]).failure.message == "No space."
    )


def test_lost_connections_alone_are_a_neighbours_death(tmp_path, monkeypatch):
    outcome = heard(tmp_path, monkeypatch, [failure(CONNECTION).to_line()])
    assert outcome.explain(900) == "the pipeline was ended by signal 9"


def test_a_traceback_of_the_launcher_is_read_where_nobody_named_a_cause(tmp_path, monkeypatch):
    lines = [
        "Traceback (most recent call last):",
        '  File "/x/runner.py", line 7, in <module>',
        "    import nothing",
        "ModuleNotFoundError: No module named 'nothing'",
    ]
    outcome = heard(tmp_path, monkeypatch, lines, ended=Exit(ExitReason.DIED, 1))
    assert (outcome.kind, outcome.failure.message) == (FAULT, "No module named 'nothing'")
    assert heard(tmp_path, monkeypatch, lines).failure is None  # killed: not for that


def test_an_exception_before_any_new_result_is_not_tried_again(tmp_path, monkeypatch):
    scene = Scene(tmp_path, monkeypatch, (DIED, 0, failure(EXCEPTION, "bang")))
    with pytest.raises(RunFailed, match=r"Rank 1 failed: RuntimeError: bang \(in work, ds_llmpq/x.py:3\); .*not tried"):
        scene.supervisor.run()
    assert scene.pauses == []
    assert (tmp_path / "launcher.log").read_text().splitlines()[-1].startswith("ds-llmpq: rank 1 failed: RuntimeError")


def test_one_after_new_results_is_tried_again_once(tmp_path, monkeypatch):
    scene = Scene(tmp_path, monkeypatch, (DIED, 5, failure(EXCEPTION)), (DIED, 5, failure(EXCEPTION)))
    with pytest.raises(RunFailed, match="boom") as raised:
        scene.supervisor.run()
    assert scene.pauses == [1.0]
    assert raised.value.failure["restarts"] == 1
    assert raised.value.failure["rank"] == 1


def test_a_fault_of_the_program_is_never_tried_again(tmp_path, monkeypatch):
    scene = Scene(tmp_path, monkeypatch, (DIED, 5, failure(FAULT)))
    with pytest.raises(RunFailed, match="no restart would change that"):
        scene.supervisor.run()
    assert scene.pauses == []


def test_a_lost_connection_is(tmp_path, monkeypatch):
    scene = Scene(tmp_path, monkeypatch, (DIED, 0, failure(CONNECTION)), (ENDED, 12))
    assert scene.supervisor.run().complete


def test_a_taken_port_is_left_to_who_took_it(tmp_path, monkeypatch):
    taken = [failure(PORT).to_line()]
    outcome, left = hear(tmp_path, monkeypatch, taken, taken, [failure(EXCEPTION, "later").to_line()], ["not reached"])
    assert (outcome.failure.message, left) == ("later", 1)


def test_but_not_for_ever(tmp_path, monkeypatch):
    outcome, left = hear(tmp_path, monkeypatch, *[[failure(PORT).to_line()]] * 9)
    assert (outcome.kind, left) == (PORT, 4)
    scene = Scene(tmp_path, monkeypatch, *[(DIED, 0, failure(PORT))] * 20, restarts=2)
    with pytest.raises(UserError, match="2 restarts in a row"):
        scene.supervisor.run()


def test_a_launcher_that_ends_well_without_the_rows_has_died(tmp_path, monkeypatch):
    scene = Scene(tmp_path, monkeypatch, (ENDED, 5), (ENDED, 12))
    assert scene.supervisor.run().complete
    assert scene.supervisor.reasons == ["the pipeline ended, but 7 of 12 rows have neither a result nor an error"]


def test_a_run_is_finished_by_its_rows_however_it_ended(tmp_path, monkeypatch):
    for end in (DIED, HUNG, DRAINED):
        scene = Scene(tmp_path, monkeypatch, (end, 12))
        assert scene.supervisor.run().complete


def test_what_an_earlier_start_measured_is_forgotten(tmp_path, monkeypatch):
    (tmp_path / "metrics.json").write_text("{}")
    Scene(tmp_path, monkeypatch, (ENDED, 12)).supervisor.run()
    assert not (tmp_path / "metrics.json").exists()


def test_files_on_another_host_are_named(tmp_path, monkeypatch):
    scene = Scene(tmp_path, monkeypatch, (ENDED, 0))
    scene.supervisor.launch.hosts = ("elsewhere",)
    with pytest.raises(UserError, match="rank 0 wrote them on host elsewhere"):
        scene.supervisor.run()


def test_without_a_device_that_stays_away_a_new_plan_goes_on(tmp_path, monkeypatch):
    scene = Scene(tmp_path, monkeypatch, (DIED, 5), (ENDED, 12), lost=[["b:0"]] * 4, on_loss="replan")
    scene.supervisor.run()
    assert scene.replanned == [["b:0"]]
    assert scene.supervisor.job.plan == "smaller plan"
    assert scene.supervisor.replans == 1


def test_or_the_run_stops_and_names_it(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="b:0 did not come back"):
        Scene(tmp_path, monkeypatch, (DIED, 5), lost=[["b:0"]] * 9, on_loss="stop").supervisor.run()


@pytest.mark.parametrize(
    ("name", "value"),
    [("restarts", -1), ("backoff_seconds", float("inf")), ("hang_seconds", 1.0), ("on_loss", "pray")],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=f"run.{name}"):
        validate_supervision(replace(SupervisionConfig(), **{name: value}))
