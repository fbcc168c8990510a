"""A rank's own part in being watched, in processes of its own."""

import signal
import subprocess
import sys
import textwrap
import time

from ds_llmpq.launch.heartbeat import ALIVE_MARK


def started(text):
    text = "from ds_llmpq.launch.heartbeat import *\nimport time\n" + textwrap.dedent(text)
    return subprocess.Popen([sys.executable, "-c", text], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_it_says_that_it_gets_on_only_while_it_does():
    process = started(
        """
        beat = Heartbeat(None)
        for _ in range(4): beat.beat(); time.sleep(0.7)
        print("still", flush=True); time.sleep(3)
        """
    )
    _, err = process.communicate(timeout=30)
    assert 2 <= err.count(ALIVE_MARK) <= 5


def test_a_changing_count_is_a_sign_of_life_and_silence_shows_stacks():
    process = started(
        """
        beat = Heartbeat(1.5)
        beat.watch(lambda: int(time.monotonic()) if time.monotonic() < end else None)
        end = time.monotonic() + 2
        def waiting_here(): time.sleep(6)
        waiting_here()
        """
    )
    _, err = process.communicate(timeout=30)
    assert err.count(ALIVE_MARK) >= 2
    assert "waiting_here" in err


def test_no_stacks_after_the_end():
    process = started("beat = Heartbeat(0.5); time.sleep(0.1); beat.close(); time.sleep(1.5)")
    assert "Timeout" not in process.communicate(timeout=30)[1]


def test_dump_stacks_on_signal():
    process = started("dump_stacks_on_signal(); print('ready', flush=True)\ndef here(): time.sleep(60)\nhere()")
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)
    assert process.poll() is None
    process.kill()
    assert "in here" in process.communicate()[1]


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
    assert process.wait(timeout=30) == 0
    process.communicate()


def test_it_ends_when_nobody_listens():
    process = started("exit_if_parent_dies(); print('ready', flush=True); time.sleep(60)")
    process.stdout.readline()
    process.stderr.close()
    assert process.wait(timeout=30) == 1
    process.stdout.close()
