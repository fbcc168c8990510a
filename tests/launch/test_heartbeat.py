"""A rank's own part in being watched, in processes of its own."""

import signal
import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace

from ds_llmpq.launch import heartbeat
from ds_llmpq.launch.heartbeat import ALIVE_MARK


def started(text):
    text = "from ds_llmpq.launch.heartbeat import *\nimport time\n" + textwrap.dedent(text)
    return subprocess.Popen([sys.executable, "-c", text], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def read_until(stream, text):
    """What a program writes up to the line that holds `text`, however long it takes."""
    read = []
    while not read or (read[-1] and text not in read[-1]):
        read.append(stream.readline())
    return "".join(read)


def test_it_says_that_it_gets_on_only_while_it_does():
    process = started(
        """
        beat = Heartbeat(None)
        for _ in range(4): beat.beat(); time.sleep(0.7)
        print("still", flush=True); time.sleep(3)
        """
    )
    _, err = process.communicate(timeout=120)
    assert 2 <= err.count(ALIVE_MARK) <= 5


def test_a_changing_count_is_a_sign_of_life_and_silence_shows_stacks():
    process = started(
        """
        from itertools import count
        looks = count()
        beat = Heartbeat(1.5)
        beat.watch(lambda: min(next(looks), 2))
        def waiting_here(): time.sleep(600)
        waiting_here()
        """
    )
    err = read_until(process.stderr, "waiting_here")
    process.kill()
    process.communicate()
    assert err.count(ALIVE_MARK) >= 2
    assert "waiting_here" in err


def test_no_stacks_after_the_end(monkeypatch):
    asked, began = [], threading.Event()

    def begin(seconds, file):
        asked.append(seconds)
        began.set()

    timer = SimpleNamespace(dump_traceback_later=begin, cancel_dump_traceback_later=lambda: asked.append(None))
    monkeypatch.setattr(heartbeat, "faulthandler", timer)
    beat = heartbeat.Heartbeat(0.5, lambda: None)
    assert began.wait(120)
    beat.close()
    assert asked == [0.5, None]


def test_dump_stacks_on_signal():
    process = started("dump_stacks_on_signal()\ndef here(): print('ready', flush=True); time.sleep(600)\nhere()")
    process.stdout.readline()
    process.send_signal(signal.SIGUSR1)
    assert "in here" in read_until(process.stderr, "in here")
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_draining_is_a_call():
    process = started(
        """
        asked = []
        drain_on_signal(lambda: asked.append(1)); print("ready", flush=True)
        while not asked: time.sleep(0.05)
        """
    )
    process.stdout.readline()
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=120) == 0
    process.communicate()


def test_it_ends_when_nobody_listens():
    process = started("exit_if_parent_dies(); print('ready', flush=True); time.sleep(600)")
    process.stdout.readline()
    process.stderr.close()
    assert process.wait(timeout=120) == 1
    process.stdout.close()
