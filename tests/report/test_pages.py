"""report.html and sweep.html: every section there and filled, nothing fetched; where a browser is installed, in it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from report_folders import write_planned, write_run

from ds_llmpq.commands import report
from ds_llmpq.commands.config import ReportConfig
from ds_llmpq.errors import UserError
from ds_llmpq.report import run_report, sweep, sweep_report
from ds_llmpq.report.page import Section

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
VOID = {"meta", "link", "img", "br"}

RUN_SECTIONS = ("summary", "gantt", "memory", "bits", "phases", "fidelity", "baselines", "origins")
SWEEP_SECTIONS = ("points", "pareto", "heat", "baselines")


class Page(HTMLParser):
    """Sections with their text and pictures, addresses that would be fetched, tags left open."""

    def __init__(self, text):
        super().__init__()
        self.sections, self.fetched, self.open, self.links = {}, [], [], []
        self.section = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = self.sections.setdefault(named["id"], {"text": "", "pictures": []})
        address = named.get("src") or (named.get("href") if tag == "link" else None)
        if tag == "a":
            self.links.append(named["href"])
        if tag == "img":
            self.section["pictures"].append(address)
            assert named["alt"]
        if address and not address.startswith("data:"):
            self.fetched.append(address)
        assert tag not in ("script", "iframe", "object")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "section":
            self.section = None

    def handle_data(self, data):
        if self.section is not None:
            self.section["text"] += data


def check_page(text, names, pictured):
    page = Page(text)
    assert page.open == []
    assert page.fetched == []
    assert not re.search(r"@import|url\(|https?://", text)
    assert tuple(page.sections) == names
    assert page.links == [f"#{name}" for name in names]
    for name, section in page.sections.items():
        assert len(section["text"].strip()) > 20, name
        assert bool(section["pictures"]) == (name in pictured), name
        assert all(p.startswith("data:image/png;base64,iVBORw0KGgo") and len(p) > 2000 for p in section["pictures"])


def test_columns_of_numbers_are_aligned_at_the_right():
    rows = [["a", "1,408 (0.97x, loss 0.054)", "4 16", "88 %"], ["b", "-", "8", "1.5 GiB"]]
    text = Section("s", "S", "").table(["name", "theirs", "widths", "used"], rows).parts[0]
    assert re.findall(r'<th class="number">(\w+)', text) == ["theirs", "used"]
    assert text.count('<td class="number">') == 4


def test_a_run_has_every_section_filled(tmp_path):
    plan = write_run(tmp_path / "run")
    text = run_report.write_run_report(tmp_path / "run", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    check_page(page, RUN_SECTIONS, {"gantt", "memory", "bits", "phases", "fidelity", "baselines"})
    for stage in plan.stages:
        assert stage.device in text
        assert stage.device in page
    assert "verdict: the run took 1.20 times as long as predicted" in text
    assert {file.name for file in (tmp_path / "out").glob("*.png")} == {
        f"{name}.png" for name in ("gantt", "memory", "bits", "phases", "fidelity", "baselines")
    }
    assert (tmp_path / "out" / "report.txt").read_text() == text + "\n"


def test_a_trace_names_its_stages(tmp_path):
    plan = write_planned(tmp_path / "plan")
    events = json.loads((tmp_path / "plan" / "predicted_trace.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {index: f"stage {index}: {stage.device}" for index, stage in enumerate(plan.stages)}
    assert {event["pid"] for event in events} == names.keys()


def test_a_plan_that_was_not_run_says_so(tmp_path):
    write_planned(tmp_path / "plan")
    run_report.write_run_report(tmp_path / "plan", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    check_page(page, RUN_SECTIONS, {"gantt", "memory", "bits", "phases", "baselines"})
    assert page.count("this plan was not run") == 2


def test_text_from_files_cannot_become_markup(tmp_path):
    write_run(tmp_path / "run")
    file = tmp_path / "run" / "plan.json"
    file.write_text(file.read_text().replace("here:0", "<b>x</b>&:0"))
    run_report.write_run_report(tmp_path / "run", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;x&lt;/b&gt;&amp;:0" in page


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.json", "{", "cannot be read"),
        ("metrics.json", "[]", "no JSON object"),
        ("metrics.json", '{"counts": {}}', "not of the form"),
        ("trace.json", '{"traceEvents": [{"ph": "X", "dur": 1}]}', "trace.json is not of the form"),
        ("plan.json", "{}", "plan"),
    ],
)
def test_a_damaged_folder_is_one_sentence(tmp_path, name, content, said):
    write_run(tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(UserError, match=said):
        run_report.write_run_report(tmp_path / "run", tmp_path / "out")


@pytest.fixture
def multirun(tmp_path):
    folder = tmp_path / "multirun"
    for theta in ("0.1", "10"):
        for room in ("40", "60"):
            point = folder / f"theta={theta},room={room}"
            write_planned(point, memory=(float(room), 50.0))
            (point / ".hydra").mkdir()
            (point / ".hydra" / "overrides.yaml").write_text(f"- theta={theta}\n- +room={room}\n- out=x\n")
    failed = folder / "theta=9,room=1"
    (failed / ".hydra").mkdir(parents=True)
    (failed / "failure.json").write_text('{"message": "No plan: too little memory.", "exit_code": 2}')
    return folder


def test_a_sweep_has_every_section_filled(multirun, tmp_path):
    text = sweep_report.write_sweep_report(multirun, tmp_path / "out")
    page = (tmp_path / "out" / "sweep.html").read_text()
    check_page(page, SWEEP_SECTIONS, {"pareto", "heat", "baselines"})
    assert "too little memory" in page
    assert "predicted speed-up over uniform: mean" in text
    assert (tmp_path / "out" / "heat_theta_room.png").is_file()


def test_a_report_inside_its_sweep_is_no_point(multirun):
    for _ in range(2):
        out = multirun / "report"
        (out / ".hydra").mkdir(parents=True, exist_ok=True)  # as Hydra makes it before the command runs
        sweep_report.write_sweep_report(multirun, out)
        assert "no plan.json" not in (out / "sweep.html").read_text()
        assert len(sweep.list_points(multirun)) == 5


def test_the_heat_map_shows_what_the_points_say(multirun):
    points = [point for point in sweep_report.read_points(multirun) if not point["failure"]]
    assert sweep.find_varied(points) == ["theta", "room"]
    assert sweep_report._values(points, "theta") == ["0.1", "10"]
    one = next(p for p in points if p["overrides"] == {"theta": "10", "room": "40"})
    cell = sweep_report._mean(points, one["overrides"], "quality_loss")
    assert (
        cell
        == one["quality_loss"]
        == json.loads((multirun / one["point"] / "plan.json").read_text())["predicted"]["quality_loss"]
    )


def test_a_sweep_with_no_plan_is_refused(tmp_path):
    with pytest.raises(UserError, match="no point with a plan"):
        sweep_report.write_sweep_report(tmp_path, tmp_path / "out")


def test_the_command_takes_the_page_from_the_key(multirun, tmp_path, capsys):
    write_run(tmp_path / "run")
    assert report.run(ReportConfig(run=str(tmp_path / "run")), tmp_path / "a") == 0
    assert report.run(ReportConfig(sweep=str(multirun)), tmp_path / "b") == 0
    assert "report.html" in capsys.readouterr().out
    for wrong in (ReportConfig(), ReportConfig(run="x", sweep="y"), ReportConfig(what="run", sweep=str(multirun))):
        with pytest.raises(UserError):
            report.run(wrong, tmp_path / "c")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_the_page(tmp_path):
    write_run(tmp_path / "run")
    run_report.write_run_report(tmp_path / "run", tmp_path / "out")
    page, picture = tmp_path / "out" / "report.html", tmp_path / "page.png"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [*command, "--enable-logging=stderr", "--window-size=1200,5000", f"--screenshot={picture}", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in shown.stderr
    import matplotlib.image

    pixels = matplotlib.image.imread(picture)[..., :3]
    # ink in every fifth of the page
    for part in range(5):
        band = pixels[part * len(pixels) // 5 : (part + 1) * len(pixels) // 5]
        assert (band < 0.9).any(axis=2).mean() > 0.003
