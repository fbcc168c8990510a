"""The command line, called in this process."""

import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

from ds_llmpq import cli


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command line; gives (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["ds-llmpq"])

    def run(*arguments):
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as exit_:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        # a slow machine says meanwhile how far planning is
        err = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("planning "))
        return exit_.value.code or 0, out, err

    return run
