"""A solver that cannot be used: the remedy is one that works on this machine."""

import pytest

from ds_llmpq.errors import UserError
from ds_llmpq.planner.milp import model


@pytest.mark.parametrize(
    ("installed", "says"), [(True, "planner.solver=highs, which is installed"), (False, "install highspy")]
)
def test_without_a_licence_the_installed_solver_is_named(monkeypatch, installed, says):
    def refuse(*_):
        raise model.SolverUnavailable("its licence has expired")

    monkeypatch.setattr(model, "_gurobi", refuse)
    monkeypatch.setattr(model, "find_spec", lambda name: object() if installed else None)
    with pytest.raises(UserError, match=says) as caught:
        model.solve_model(None, "gurobi")
    assert "its licence has expired" in str(caught.value)
    assert ("install highspy" in str(caught.value)) is not installed
