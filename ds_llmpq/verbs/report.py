"""`report fidelity`: predictions of a profile or of a run's plan, held against what was measured."""

from __future__ import annotations

from pathlib import Path

from ds_llmpq import config
from ds_llmpq.cost.fit import read_model
from ds_llmpq.errors import UserError
from ds_llmpq.report import fidelity
from ds_llmpq.schema import ReportVerb


def run(settings: ReportVerb, out: Path) -> int:
    if settings.what != "fidelity":
        raise UserError(f"report knows fidelity, not {settings.what!r}; say `ds-llmpq report fidelity run=DIR`.")
    if (settings.run is None) == (settings.profile is None):
        raise UserError("report fidelity needs either run=DIR or profile=DIR.")
    out.mkdir(parents=True, exist_ok=True)
    if settings.profile is not None:
        folder = config.absolute(settings.profile)
        model = read_model(folder / "latency.json")
        text, pairs = fidelity.profile_table(model), fidelity.profile_pairs(model)
        title = "Layer times: fits against left-out measurements"
    else:
        folder = config.absolute(settings.run)
        text, pairs = fidelity.run_text(folder), fidelity.run_pairs(folder)
        title = "Passes of a run: plan against measurement"
    print(text)
    (out / "fidelity.txt").write_text(text + "\n", encoding="utf-8")
    fidelity.scatter(pairs, out / "fidelity.png", title)
    print(f"scatter: {out / 'fidelity.png'}")
    return 0
