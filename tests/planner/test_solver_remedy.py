"""Gurobi without a licence: another solver is named, or taken."""

import pytest

from ds_llmpq.errors import UserError
from ds_llmpq.planner.milp import model


def test_without_a_licence_highs_is_named_or_taken(monkeypatch):
    def refuse(*_):
        raise model.LicenceRefused("its licence has expired")

    monkeypatch.setattr(model, "_gurobi", refuse)
    small = model.Model()
    column = small.column(cost=1.0, integer=True)
    small.row([(column, 1.0)], low=1.5)
    with pytest.raises(UserError, match=r"\(its licence has expired\); give planner.solver=highs\.$"):
        model.solve_model(small, "gurobi")
    found = model.solve_model(small, "auto")
    assert (found.solver, found.objective) == ("highs", 2.0)
