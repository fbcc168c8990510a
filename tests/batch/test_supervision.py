"""When a batch is started again, when not, and what is planned when devices stay away; the launcher is a stand-in."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from ds_llmpq.batch import supervision
from ds_llmpq.batch.job import Job
from ds_llmpq.batch.journal import Identity, Journal
from ds_llmpq.batch.progress import MEMORY_MARK
from ds_llmpq.batch.supervision import Supervisor, checked_supervision
from ds_llmpq.engine.following import Ended, Reason
from ds_llmpq.errors import Interrupted, UserError
from ds_llmpq.planner.plan import Plan
from ds_llmpq.planner.problem import Workload
from ds_llmpq.schema import BatchConfig, EngineConfig, SupervisionConfig

DIED, HUNG, ENDED = Ended(Reason.DIED, -9), Ended(Reason.HUNG, -9), Ended(Reason.ENDED, 0)
DRAINED = Ended(Reason.DRAINED, 0)
OUT_OF_MEMORY = object()


class Scene:
    """A pipeline that ends as told: (how, results that are there then, mistakes)."""

    def __init__(self, tmp_path, monkeypatch, *ends, lost=(), **settings):
        self.ends, self.lost, self.pauses, self.replanned = list(ends), list(lost), [], []
        self.results = 0
        monkeypatch.setattr(supervision, "read_finished", lambda folder: range(self.results))
        monkeypatch.setattr(Supervisor, "_attempt", lambda supervisor: self.attempt())
        job = SimpleNamespace(output=str(tmp_path), plan="plan")
        self.supervisor = Supervisor(
            job, SimpleNamespace(folder=tmp_path), SupervisionConfig(backoff_seconds=1.0, **settings),
            Journal(Identity("a", "b", "c", {})), self.replan,
            find_lost=lambda plan: self.lost.pop(0) if self.lost else [], pause=self.pauses.append,
        )  # fmt: skip

    def attempt(self):
        how, self.results, *mistakes = self.ends.pop(0)
        ran_out = OUT_OF_MEMORY in mistakes
        return how, [] if ran_out else mistakes, ran_out

    def replan(self, lost):
        self.replanned.append(lost)
        return replace_plan(self.supervisor.job), self.supervisor.launch


def replace_plan(job):
    return SimpleNamespace(output=job.output, plan="smaller plan")


def test_a_death_is_followed_by_a_restart_that_goes_on(tmp_path, monkeypatch):
    scene = Scene(tmp_path, monkeypatch, (DIED, 5), (HUNG, 9), (ENDED, 12))
    scene.supervisor.run()
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
    scene = Scene(tmp_path, monkeypatch, (DIED, 0, "No space left."))
    with pytest.raises(UserError, match="No space left"):
        scene.supervisor.run()
    assert Journal.read(tmp_path).attempts[-1].reason == "mistake: No space left."


def test_a_drained_run_is_interrupted_and_says_how_to_go_on(tmp_path, monkeypatch):
    with pytest.raises(Interrupted, match=f"the same command with out={tmp_path} goes on"):
        Scene(tmp_path, monkeypatch, (DRAINED, 3)).supervisor.run()


def test_a_device_that_comes_back_is_waited_for(tmp_path, monkeypatch):
    scene = Scene(tmp_path, monkeypatch, (DIED, 5), (ENDED, 9), lost=[["b:0"], ["b:0"], []], on_loss="replan")
    scene.supervisor.run()
    assert scene.pauses == [1.0, 2.0, 4.0]
    assert scene.replanned == []


def in_flight(scene):
    return scene.supervisor.job.plan.workload.sequences


def with_plan(scene, sequences):
    workload = Workload(sequences, 16, 8)
    plan = Plan(None, workload, (), {"prefill": 3, "decode": sequences // 2}, {}, None)
    scene.supervisor.job = Job(plan, "m", "i", scene.supervisor.job.output, EngineConfig(), BatchConfig())
    return scene


def test_out_of_memory_goes_on_with_fewer_in_flight(tmp_path, monkeypatch):
    ends = (DIED, 5, OUT_OF_MEMORY), (DIED, 5), (DIED, 6, OUT_OF_MEMORY), (ENDED, 9)
    scene = with_plan(Scene(tmp_path, monkeypatch, *ends), 8)
    scene.supervisor.run()
    assert in_flight(scene) == 2  # a death of another kind changes nothing
    assert dict(scene.supervisor.job.plan.micro_batch) == {"prefill": 1, "decode": 1}
    found = [(entry["sequences"], entry["sequences_now"]) for entry in scene.supervisor.memory_warnings]
    assert found == [(8, 4), (4, 2)]
    assert scene.supervisor.reasons[0] == "the pipeline ran out of memory"
    assert Journal.read(tmp_path).attempts[0].reason == "the pipeline ran out of memory"


def test_one_sequence_is_the_fewest(tmp_path, monkeypatch):
    ends = [(DIED, 4, OUT_OF_MEMORY)] * 9
    scene = with_plan(Scene(tmp_path, monkeypatch, *ends, restarts=3), 2)
    with pytest.raises(UserError, match="ran out of memory and 3 restarts in a row brought no result"):
        scene.supervisor.run()
    assert in_flight(scene) == 1
    assert len(scene.supervisor.memory_warnings) == 1


@pytest.mark.parametrize(
    ("line", "killed", "wanted"),
    [(f"host: {MEMORY_MARK}\n", 0, True), ("Traceback\n", 1, True), ("Traceback\n", 0, False)],
)
def test_what_counts_as_out_of_memory(tmp_path, monkeypatch, line, killed, wanted):
    """A rank's word, or the kernel's count of what it killed."""
    kills = iter([3, 3 + killed])

    def followed(launch, arguments, watch, mark):
        watch.on_line(line)
        return DIED

    monkeypatch.setattr(supervision, "followed", followed)
    job = SimpleNamespace(output=str(tmp_path), plan="plan", to_token=lambda: "job")
    supervisor = Supervisor(
        job, SimpleNamespace(folder=tmp_path), SupervisionConfig(), Journal(Identity("a", "b", "c", {})), None,
        count_kills=lambda: next(kills),
    )  # fmt: skip
    assert supervisor._attempt() == (DIED, [], wanted)


def test_without_a_device_that_stays_away_a_new_plan_goes_on(tmp_path, monkeypatch):
    scene = Scene(tmp_path, monkeypatch, (DIED, 5), (ENDED, 9), lost=[["b:0"]] * 4, on_loss="replan")
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
        checked_supervision(replace(SupervisionConfig(), **{name: value}))
