"""A sample of `python scripts/kill_runs.py --runs 100`, at default settings: strikes that once lost rows or people."""

import pytest
from kills import PHASES, KillRun, Strike, prepare

pytestmark = [pytest.mark.slow, pytest.mark.launcher]
REQUESTS = 90
STRIKES = {
    "the per-host launcher, after a drain": Strike("after a drain", (("host launcher", "KILL"),), 20, 0.0),
    "the runner and a rank": Strike("serving", (("launcher", "KILL"), ("rank 0", "TERM")), 20, 0.0),
    "run, beside a stopped rank": Strike("serving", (("rank 1", "STOP"), ("run", "KILL")), 20, 0.0),
    "a stopped launcher": Strike("serving", (("host launcher", "STOP"),), 10, 0.0),
}


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("kills"), REQUESTS)


@pytest.mark.parametrize("name", STRIKES)
def test_nothing_is_lost_and_nobody_is_called(batch, name, tmp_path):
    arguments, expected = batch
    outcome = KillRun(tmp_path, arguments, REQUESTS, STRIKES[name]).go(expected)
    assert outcome.struck
    assert outcome.problem == ""


def test_seeds_cover_every_phase_victim_and_signal():
    strikes = [Strike.of_seed(seed, REQUESTS) for seed in range(100)]
    assert {strike.phase for strike in strikes} == set(PHASES)
    blows = {blow for strike in strikes for blow in strike.blows}
    assert len(blows) == 15
    assert 25 <= sum(len(strike.blows) == 2 for strike in strikes) <= 55
