"""What `gpu.py` is asked to show on one H100 or H200, each bar beside what was measured."""

from __future__ import annotations

from typing import Any, NamedTuple

from gpu_batches import MIXES, requests
from gpu_run import Run

GENERATE_ROWS = 64
NOT_MEASURED = "not measured"


class Bar(NamedTuple):
    what: str
    wanted: str
    found: float | None
    met: bool = False

    def write(self, run: Run) -> None:
        met = NOT_MEASURED if self.found is None else "yes" if self.met else "NO"
        run.add(self.what, "measured", bar=self.wanted, found="" if self.found is None else self.found, met=met)


def write_bars(run: Run) -> None:
    """One line a bar; those of a small model or a CPU would say nothing."""
    if run.tiny or not run.on_gpu:
        run.add("bars are for the 8B shape on a GPU", "none")
        return
    for bar in list_bars(run.lines):
        bar.write(run)


def list_bars(lines: list[dict[str, Any]]) -> list[Bar]:
    def step(bits: int, rows: int, context: int = 256) -> dict[str, Any]:
        return _find(lines, f"decode at {bits} bits", rows=rows, context=context)

    def faster(bits: int, rows: int, times: float) -> Bar:
        found = _divide(step(16, rows).get("captured_ms"), step(bits, rows).get("captured_ms"))
        return _at_least(f"{bits} bits beside 16, {rows} rows", found, times, "x")

    batch = _find(lines, "batch: ShareGPT-like")
    whole = batch if batch.get("requests") == batch.get("of") and not batch.get("cut_by_time") else {}
    # published figures leave out what comes before serving, and our graphs are captured meanwhile
    tokens = whole.get("captured_tokens_s")
    prefill = [each["tokens_s"] for each in lines if each["what"] == "prefill at 16 bits" and "tokens_s" in each]
    return [
        _at_most("decode, 16 bits, 1 x 256", step(16, 1).get("captured_ms"), 5.0, "ms"),
        _at_least("decode, 16 bits, 64 x 256", step(16, 64).get("tokens_s"), 9300, "tokens/s"),
        _at_least("decode, 16 bits, 128 x 512", step(16, 128, 512).get("tokens_s"), 13500, "tokens/s"),
        _at_least("prefill, 16 bits, best", max(prefill, default=None), 30000, "tokens/s"),
        *(faster(4, rows, times) for rows, times in ((1, 1.9), (16, 1.5), (64, 1.3))),
        faster(8, 1, 1.35),
        _at_least("batch of 1,000, 16 bits, without the time to capture", tokens, 12500, "output tokens/s (aim 16000)"),
        _at_least("batch beside generate's steps on the same requests", _divide(tokens, _generate(lines)), 5, "x"),
        _at_most("share of the batch in which the device waits", _waiting(whole), 0.03, ""),
        *(_within(f"{what}, predicted without a profile", ratios, 0.25) for what, ratios in _predicted(lines)),
        Bar("layers and runs, predicted with a profile", "within 10 %", None),
        _within("device memory beside the plan", _ratios(lines, "memory: ", "peak_over_planned"), 0.02),
    ]


def _find(lines: list[dict[str, Any]], what: str, **figures: int) -> dict[str, Any]:
    fitting = (each for each in lines if each["what"] == what)
    return next((each for each in fitting if all(each.get(name) == figures[name] for name in figures)), {})


def _ratios(lines: list[dict[str, Any]], what: str, figure: str) -> list[float]:
    return [each[figure] for each in lines if each["what"].startswith(what) and each.get(figure)]


def _predicted(lines: list[dict[str, Any]]) -> list[tuple[str, list[float]]]:
    steps = _ratios(lines, "decode at", "measured_over_predicted") + _ratios(
        lines, "prefill at", "measured_over_predicted"
    )
    return [("passes", steps), ("batches", _ratios(lines, "batch: ", "measured_over_predicted"))]


def _generate(lines: list[dict[str, Any]]) -> float | None:
    """Output tokens/s of `generate` on the batch's requests, computed: as many at once as were timed, each batch until
    its longest answer ends; prefill and padding left out, in its favour."""
    found = _find(lines, "generate, static cache, not compiled", rows=GENERATE_ROWS)
    if "ms" not in found:
        return None
    answers = [tokens for _, tokens in requests(MIXES["ShareGPT-like"], 1000, 10)]
    steps = sum(max(answers[start : start + GENERATE_ROWS]) for start in range(0, len(answers), GENERATE_ROWS))
    return sum(answers) / (steps * found["ms"] / 1e3)


def _waiting(batch: dict[str, Any]) -> float | None:
    share = batch.get("device_busy_share")
    return None if share is None else 1 - share


def _divide(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def _at_least(what: str, found: float | None, bound: float, unit: str) -> Bar:
    return Bar(what, f"at least {bound:g} {unit}".strip(), found, found is not None and found >= bound)


def _at_most(what: str, found: float | None, bound: float, unit: str) -> Bar:
    return Bar(what, f"at most {bound:g} {unit}".strip(), found, found is not None and found <= bound)


def _within(what: str, ratios: list[float], bound: float) -> Bar:
    """By the ratio that is farthest off."""
    worst = max(ratios, key=lambda ratio: max(ratio, 1 / ratio), default=None)
    fits = worst is not None and 1 - bound <= worst <= 1 + bound
    return Bar(what, f"within {100 * bound:g} %", worst, fits)
