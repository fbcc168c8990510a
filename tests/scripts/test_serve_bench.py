"""How the bench beside other engines reads a run's trace, written as a run writes it."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

import serve

from ds_llmpq.engine.trace import build_chrome_events, format_trace

# two waves of one sequence each: a prefill pass, its token, a decode pass, its token
NAMES = ["prefill", "sample", "decode"]
WAVE = [(0, 0.0, 0.5), (1, 0.5, 0.1), (2, 1.0, 0.2), (1, 1.2, 0.1)]
SPANS = WAVE + [(name, 2 + start, seconds) for name, start, seconds in WAVE]


def test_the_second_wave_is_timed_from_its_prefill(tmp_path):
    name, start, seconds = map(list, zip(*SPANS, strict=True))
    ones = [1] * len(name)
    columns = {"name": name, "start": start, "seconds": seconds, "rows": ones, "tokens": ones}
    stage = {"name": "process_name", "ph": "M", "pid": 0, "args": {"name": "stage 0"}}
    events = [stage, *build_chrome_events({"stage": 0, "names": NAMES, **columns})]
    (tmp_path / "trace.json").write_text("".join(format_trace(events)))
    measured = {"startup_seconds": 1.0, "time_to_first_token_seconds": 2.0}
    (tmp_path / "metrics.json").write_text(json.dumps({"measured": measured}))
    found = serve.spans(tmp_path, 1)
    assert found["first_seconds"] == pytest.approx(0.6)
    assert found["all_seconds"] == pytest.approx(1.3)
    assert found["overhead_share"] == pytest.approx(1 - 0.7 / 1.3)
