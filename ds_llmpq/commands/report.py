"""`report`: shows a run, a sweep, or the fidelity of predictions in a page, pictures and a table."""

from __future__ import annotations

from pathlib import Path

from ds_llmpq import config
from ds_llmpq.commands.config import ReportConfig
from ds_llmpq.cost.fit import read_model
from ds_llmpq.errors import UserError
from ds_llmpq.report import fidelity
from ds_llmpq.report.run_report import write_run_report
from ds_llmpq.report.sweep_report import write_sweep_report

_SOURCES = {"run": ("run",), "sweep": ("sweep",), "fidelity": ("run", "profile")}


def run(settings: ReportConfig, out: Path) -> int:
    given = [name for name in ("run", "sweep", "profile") if getattr(settings, name) is not None]
    if len(given) != 1:
        raise UserError("report needs one of run=DIR, sweep=DIR and profile=DIR.")
    what = settings.what or ("fidelity" if given == ["profile"] else given[0])
    if given[0] not in _SOURCES.get(what, ()):
        raise UserError(f"report knows run, sweep and fidelity, and cannot make {what!r} from {given[0]}=DIR.")
    folder = config.make_absolute(getattr(settings, given[0]))
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give {given[0]}=DIR.")
    if what == "run":
        print(write_run_report(folder, out))
        print(f"page: {out / 'report.html'}")
    elif what == "sweep":
        print(write_sweep_report(folder, out))
        print(f"page: {out / 'sweep.html'}")
    else:
        _fidelity(folder, given[0], out)
    return 0


def _fidelity(folder: Path, kind: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if kind == "profile":
        model = read_model(folder / "latency.json")
        text, pairs = fidelity.format_profile(model), fidelity.pair_profile(model)
        title = "Layer times: fits against left-out measurements"
    else:
        text, pairs = fidelity.describe_run(folder), fidelity.pair_run(folder)
        title = "Passes of a run: plan against measurement"
    print(text)
    (out / "fidelity.txt").write_text(text + "\n", encoding="utf-8")
    fidelity.scatter(pairs, out / "fidelity.png", title)
    print(f"scatter: {out / 'fidelity.png'}")
