"""Undocumented parts of highspy."""

import subprocess
import sys

LIBRARY = "highspy"
SEEN = ("1.12.0", "1.16.0")


def test_ctrl_c_ends_a_solve():
    """`Highs.HandleKeyboardInterrupt`, in planner/milp/model.py: solves in a thread, so that Ctrl-C is seen."""
    import highspy

    highs = highspy.Highs()
    highs.HandleKeyboardInterrupt = True
    assert highs.HandleKeyboardInterrupt is True
    assert isinstance(highspy.Highs.__dict__["HandleKeyboardInterrupt"], property)


def test_model_handed_over_as_arrays():
    """`highs.passModel(HighsLp)`, in planner/milp/model.py: a model as arrays, rows first; solved with our options,
    and read back."""
    from ds_llmpq.planner.milp.model import Model, solve_model

    model = Model()
    x, y = (model.column(cost, 0, 10, integer=True) for cost in (-2.0, -3.0))
    model.row([(x, 2.0), (y, 4.0)], high=11.0)
    model.row([(x, 1.0), (y, -1.0)], high=1.5)
    found = solve_model(model, "highs")
    assert found.x.round().tolist() == [1, 2]
    assert found.objective == found.bound == -8.0


def test_nothing_is_printed():
    """`Highs.enableCallbacks`, in planner/linear.py: the constructor calls it, and it prints the library's name, once a
    process, unless the output is off by then."""
    code = "from ds_llmpq.planner.linear import quiet_highs; quiet_highs().run()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == ""


def test_silence_of_a_solver(capfd):
    """`Highs.enableCallbacks()`, in planner/linear.py: called while the object is made, and what prints HiGHS's name;
    overridden to switch output off first."""
    import highspy

    from ds_llmpq.planner.linear import quiet_highs

    highs = quiet_highs()
    assert "enableCallbacks" in highspy.Highs.__init__.__code__.co_names
    assert highs.getOptionValue("output_flag")[1] is False
    out, err = capfd.readouterr()
    assert out + err == ""
