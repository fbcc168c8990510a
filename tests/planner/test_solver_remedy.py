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


def test_a_licence_file_is_found_where_it_may_lie(monkeypatch, tmp_path):
    monkeypatch.delenv(model.LICENCE_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(model, "SYSTEM_FOLDER", tmp_path / "system")
    monkeypatch.chdir(tmp_path)
    assert model.find_gurobi_licence() is None
    for folder in ("conf", "home", "system"):  # each before the ones so far
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "gurobi.lic").touch()
        assert model.find_gurobi_licence() == tmp_path / folder / "gurobi.lic"
    monkeypatch.setenv(model.LICENCE_VARIABLE, "/elsewhere/mine.lic")
    assert str(model.find_gurobi_licence()) == "/elsewhere/mine.lic"


def test_a_licence_that_cannot_be_read_leaves_highs(monkeypatch, tmp_path):
    pytest.importorskip("gurobipy")
    monkeypatch.setenv(model.LICENCE_VARIABLE, str(tmp_path / "none.lic"))
    small = model.Model()
    small.row([(small.column(cost=1.0, integer=True), 1.0)], low=1.5)
    assert model.solve_model(small, "auto").solver == "highs"
    with pytest.raises(UserError, match=r"cannot be used \(its licence does not allow it: .*give planner.solver=highs"):
        model.solve_model(small, "gurobi")
