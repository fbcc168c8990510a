"""Following a started program: its lines, its death, its silence, signals, and what it leaves behind. All stand-ins."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from types import SimpleNamespace

import psutil
import pytest

from ds_llmpq.launch import process_monitor
from ds_llmpq.launch.environment import RUN_MARK
from ds_llmpq.launch.process_monitor import ExitReason, Line, MonitorOptions, list_marked, monitor


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("_GRACE_SECONDS", 0.5), ("_STARTUP_SECONDS", 0.5), ("_STACKS_SECONDS", 0.5)):
        monkeypatch.setattr(process_monitor, name, seconds)


@pytest.fixture
def program(tmp_path):
    """Follows a Python program; returns what came of it and its log."""

    def run(text, **watch):
        mark = uuid.uuid4().hex
        line = [sys.executable, "-u", "-c", textwrap.dedent(text)]
        watch = {"on_line": lambda text: Line.HEARTBEAT if text == "alive" else Line.TEXT} | watch
        ended = monitor(line, dict(os.environ), tmp_path / "log", mark, MonitorOptions(**watch))
        assert not list_marked(mark), "a process was left behind"
        return ended, (tmp_path / "log").read_text()

    return run


def test_lines_reach_the_log_but_signs_of_life_do_not(program):
    ended, log = program("print('one'); print('alive'); print('two')")
    assert (ended.reason, ended.code) == (ExitReason.ENDED, 0)
    assert log == "one\ntwo\n"


def test_a_death_is_seen_and_orphans_are_ended(program):
    """What a killed launcher leaves: its children hold the pipe open, and would go on for ever."""
    ended, _ = program(
        """
        import os, signal, subprocess, sys
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    assert (ended.reason, ended.code) == (ExitReason.DIED, -signal.SIGKILL)


def test_the_others_get_a_moment_when_one_rank_has_died(program, monkeypatch):
    monkeypatch.setattr(process_monitor, "_GRACE_SECONDS", 120)
    ended, log = program(
        """
        import time
        print("exits with return code = -9"); time.sleep(0.1); print("peer is gone")
        """
    )
    assert ended.reason is ExitReason.DIED
    assert "peer is gone" in log


def test_an_exit_code_of_zero_is_no_end_while_ranks_live(program):
    """As DeepSpeed's runner has it when its per-host launcher was killed."""
    ended, _ = program(
        """
        import os, subprocess, sys
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        os._exit(0)
        """
    )
    assert (ended.reason, ended.code) == (ExitReason.DIED, 0)


def test_the_code_is_that_of_the_rank(program):
    assert program('print("exits with return code = 7"); import sys; sys.exit(1)')[0].code == 7


def test_last_words_are_a_death_and_no_signal(program, monkeypatch):
    """The launcher may need longer to end than it is given; that is not why."""
    monkeypatch.setattr(process_monitor, "_GRACE_SECONDS", 4)
    ended, log = program(
        "import time; print('failed'); time.sleep(0.1); print('peer is gone'); time.sleep(600)",
        on_line=lambda text: Line.FAILURE if text == "failed" else Line.TEXT,
    )
    assert (ended.reason, ended.code) == (ExitReason.DIED, None)
    assert log == "failed\npeer is gone\n"


def test_what_is_to_be_hidden_is(program):
    assert program("print('--job', 'x' * 5000, 'end')", hidden="x" * 5000)[1] == "--job ... end\n"


def test_a_process_that_stays_stopped_is_noticed(program):
    text = """
        import os, signal, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        os.kill(child.pid, signal.SIGSTOP)
        while True: print('alive'); time.sleep(0.1)
        """
    assert program(text, hang_seconds=60, stopped_seconds=1.0)[0].reason is ExitReason.STOPPED


def test_silence_is_a_hang(program):
    ended, _ = program("import time; print('alive'); time.sleep(600)", hang_seconds=0.6)
    assert ended.reason is ExitReason.HUNG


def test_life_is_no_hang(program, monkeypatch):
    """The clock goes on with each line, so that no stall of the machine is a silence."""
    now = 0.0
    monkeypatch.setattr(process_monitor, "time", SimpleNamespace(monotonic=lambda: now))

    def hear(text):
        nonlocal now
        now += 0.5
        return Line.HEARTBEAT if text == "alive" else Line.TEXT

    alive = "import time\nfor _ in range(8): print('alive'); time.sleep(0.05)"
    assert program(alive, hang_seconds=0.8, on_line=hear)[0].reason is ExitReason.ENDED
    assert now == 4.0


def test_chatter_is_no_sign_of_life(program):
    ended, _ = program("import time\nwhile True: print('warning'); time.sleep(0.1)", hang_seconds=0.6)
    assert ended.reason is ExitReason.HUNG


def test_a_stopped_rank_shows_its_stacks(program, monkeypatch):
    monkeypatch.setattr(process_monitor, "_STACKS_SECONDS", 120)  # it ends when it is woken
    monkeypatch.setattr(process_monitor, "_STARTUP_SECONDS", 120)
    heard = []

    def hear(text):
        heard.append(text)
        return Line.HEARTBEAT if text == "alive" else Line.TEXT

    ended, log = program(
        """
        import faulthandler, os, signal
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        def stuck_here(): print("alive"); os.kill(os.getpid(), signal.SIGSTOP)
        stuck_here()
        """,
        hang_seconds=3,
        on_line=hear,
        started=lambda: bool(heard),
    )
    assert ended.reason is ExitReason.HUNG
    assert "stuck_here" in log


def send_when_ready(number):
    """Sends this process a signal when the program says that it is ready: never before somebody handles it."""

    def hear(text):
        if text == "ready":
            os.kill(os.getpid(), number)
        return Line.TEXT

    return hear


READY = "import time; print('ready'); time.sleep(600)"


def test_the_first_signal_drains_and_the_run_ends_by_itself(program, tmp_path):
    asked = []

    def drain():
        asked.append(1)
        (tmp_path / "drain").touch()
        return True

    text = f"import os, time; print('ready')\nwhile not os.path.exists({str(tmp_path / 'drain')!r}): time.sleep(0.05)"
    ended, _ = program(text, drain=drain, drain_seconds=120, on_line=send_when_ready(signal.SIGTERM))
    assert (ended.reason, ended.code) == (ExitReason.DRAINED, 0)
    assert asked == [1]


def test_what_does_not_drain_in_time_is_cut_off(program):
    cut = program(READY, drain=lambda: True, drain_seconds=0.5, on_line=send_when_ready(signal.SIGTERM))
    assert cut[0].reason is ExitReason.CUT_OFF


@pytest.mark.parametrize("drain", [None, lambda: False])
def test_without_anything_to_drain_the_first_signal_ends_it(program, drain):
    with pytest.raises(KeyboardInterrupt):
        program(READY, drain=drain, on_line=send_when_ready(signal.SIGTERM))


def test_a_second_signal_ends_it_at_once(program):
    def drain():
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    with pytest.raises(KeyboardInterrupt):
        program(READY, drain=drain, drain_seconds=600, on_line=send_when_ready(signal.SIGTERM))


def test_a_clock_that_jumps_changes_nothing(program, monkeypatch):
    """Bounds are on the clock that only goes forward."""
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert program("import time; print('alive'); time.sleep(0.3)", hang_seconds=60)[0].reason is ExitReason.ENDED


def test_a_log_on_a_full_disk_does_not_end_the_run(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    (tmp_path / "log").symlink_to("/dev/full")
    line = [sys.executable, "-c", "print('x' * 100000)"]
    ended = monitor(line, dict(os.environ), tmp_path / "log", "m", MonitorOptions(lambda text: Line.TEXT))
    assert ended.reason is ExitReason.ENDED


def test_only_marked_processes_are_found():
    mark = uuid.uuid4().hex
    line = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(line, env=os.environ | {RUN_MARK: mark}) as mine, subprocess.Popen(line) as other:
        try:
            assert [process.pid for process in list_marked(mark)] == [mine.pid]
            assert psutil.pid_exists(other.pid)
        finally:
            mine.kill()
            other.kill()
