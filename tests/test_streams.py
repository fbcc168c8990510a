"""Commands whose standard streams are closed, full, or of an encoding that lacks characters."""

import os
import subprocess
import sys

import pytest

from ds_llmpq import __version__

SHOW = "from ds_llmpq.streams import *; prepare_streams(); "


def run_shell(line, **env):
    """`line` with $PYTHON and $COMMAND set."""
    env = {**os.environ, "PYTHON": sys.executable, "COMMAND": f"{sys.executable} -m ds_llmpq.cli", **env}
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, encoding="utf-8", env=env, timeout=60)


@pytest.mark.parametrize("redirection", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_file_gets_no_closed_streams_number(redirection, tmp_path):
    opened = f"print(open({str(tmp_path / 'file')!r}, 'w').fileno() > 2, file=open({str(tmp_path / 'said')!r}, 'w'))"
    shown = "import sys; print('to stdout'); print('to stderr', file=sys.stderr)"
    result = run_shell(f'$PYTHON -c "{SHOW}{shown}; {opened}" {redirection}')
    assert result.returncode == 0
    assert (tmp_path / "said").read_text() == "True\n"
    assert result.stdout == ("to stdout\n" if ">&-" not in redirection.replace("2>&-", "") else "")
    assert result.stderr == ("to stderr\n" if "2>&-" not in redirection else "")


def test_what_the_encoding_lacks_is_escaped():
    result = run_shell(f'$PYTHON -c "{SHOW}print(chr(0x17d))"', LC_ALL="C", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout) == (0, "\\u017d\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_for_stdout_is_one_sentence_and_for_stderr_none(unbuffered):
    result = run_shell("$COMMAND --version >/dev/full", PYTHONUNBUFFERED=unbuffered)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: what was to be printed could not be written (No space left on device)")
    result = run_shell("$COMMAND nonsense 2>/dev/full", PYTHONUNBUFFERED=unbuffered)
    assert (result.returncode, result.stdout) == (1, "")
    result = run_shell("$COMMAND --version 2>/dev/full", PYTHONUNBUFFERED=unbuffered)
    assert (result.returncode, result.stdout) == (0, f"{__version__}\n")
