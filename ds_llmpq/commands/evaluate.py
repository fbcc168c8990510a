"""`evaluate`: what a plan's widths cost in quality, measured on the pipeline itself, beside what was predicted."""

from __future__ import annotations

import json
import math
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from ds_llmpq import config
from ds_llmpq.cluster.hostfile import write_hostfile
from ds_llmpq.commands.config import EvaluateConfig
from ds_llmpq.errors import Interrupted, RunFailed
from ds_llmpq.evaluation.job import ScoreJob
from ds_llmpq.files import open_regular, read_json
from ds_llmpq.launch.attempt import MISTAKE, Listener, Outcome
from ds_llmpq.launch.failures import PORT
from ds_llmpq.launch.launcher import LOG_NAME, Launch, run_launcher
from ds_llmpq.launch.process_monitor import ExitReason, MonitorOptions
from ds_llmpq.plan import Plan, Quantization, launch_order, write_plan
from ds_llmpq.report.plan_table import format_table
from ds_llmpq.report.solver_progress import progress_line
from ds_llmpq.serving.batch_run import choose_model, find_checkpoint, obtain_plan
from ds_llmpq.serving.supervisor import check_hang_seconds

_MOST_PORTS = 5  # tried, where another process is quicker each time


def run(settings: EvaluateConfig, out: Path) -> int:
    settings = choose_model(config.load_cluster(settings))
    evaluation = settings.evaluation
    check_hang_seconds(settings.run)
    for name in ("text", "tasks_path"):
        if getattr(evaluation, name) is not None:
            setattr(evaluation, name, str(config.make_absolute(getattr(evaluation, name))))
    if evaluation.text is not None:  # ranks read it: said here before they start
        open_regular(evaluation.text, "text", "give a plain text file in UTF-8").close()
    out.mkdir(parents=True, exist_ok=True)
    plan = obtain_plan(settings, out, progress_line())
    job = ScoreJob(
        plan=plan,
        model_path=str(find_checkpoint(settings, plan)),
        output=str(out),
        engine=settings.engine,
        evaluation=evaluation,
        trust_remote_code=settings.model.trust_remote_code,
        hang_seconds=settings.run.hang_seconds,
    )
    if evaluation.tasks:
        found = _score(job, settings, out)
        print(tasks_table(found["tasks"]))
    else:
        found = _against_reference(job, settings, out) if evaluation.reference else _score(job, settings, out)
        print(scores_table(found, plan))
    print(f"scores: {out / 'scores.json'}")
    return 0


def _against_reference(job: ScoreJob, settings: EvaluateConfig, out: Path) -> dict[str, Any]:
    """Scores the plan with nothing quantized first, then the plan itself against that."""
    file = out / "reference.f32"
    full = replace(
        job.plan,
        stages=tuple(replace(stage, bits=(16,) * len(stage.bits)) for stage in job.plan.stages),
        quant=replace(job.plan.quant or Quantization(), lm_head_bits=16),
    )
    folder = out / "reference"
    folder.mkdir(exist_ok=True)
    path = str(find_checkpoint(replace(settings, quantized=None), job.plan))
    try:
        unquantized = replace(
            job, plan=full, model_path=path, output=str(folder), reference=str(file), keeps_reference=True
        )  # fmt: skip
        reference = _score(unquantized, settings, folder)
        found = _score(replace(job, reference=str(file)), settings, out)
    finally:
        file.unlink(missing_ok=True)
    pairs = [a - b for a, b in zip(reference["logprobs"], found["logprobs"], strict=True)]
    mean = math.fsum(pairs) / len(pairs)
    spread = math.fsum((value - mean) ** 2 for value in pairs) / len(pairs)
    origins = job.plan.provenance
    found |= {
        "reference": {key: reference[key] for key in ("nats_per_token", "perplexity_per_token", "perplexity_per_word")},
        "loss_increase": {
            "measured": mean,
            "standard_error": math.sqrt(spread / len(pairs)),
            "predicted": job.plan.predicted.quality_loss,
            "predicted_from": origins.get("sensitivity") or origins.get("omega", "unknown"),  # the latter: former plans
        },
    }
    (out / "scores.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def _score(job: ScoreJob, settings: EvaluateConfig, folder: Path) -> dict[str, Any]:
    """Runs one job under the launcher; `RunFailed` with what a rank named, or how the launcher ended."""
    write_plan(folder / "plan.json", job.plan)
    write_hostfile(folder / "hostfile", launch_order(job.plan))
    (folder / "scores.json").unlink(missing_ok=True)  # of an earlier evaluation
    for _ in range(_MOST_PORTS):
        outcome = _attempt(job, settings, folder)
        if outcome.kind != PORT:
            break
    if outcome.exit.reason is ExitReason.ENDED and (folder / "scores.json").exists():
        return read_json(folder / "scores.json", "Scores", "evaluate again", infinity=True)
    if outcome.kind == MISTAKE:
        sentence = outcome.failure.message
    else:
        why = outcome.explain(settings.run.hang_seconds, MonitorOptions.stopped_seconds)
        sentence = f"{why[:1].upper()}{why[1:]}; what the ranks said is in {folder / LOG_NAME}."
    raise RunFailed(sentence, outcome.record())


def _attempt(job: ScoreJob, settings: EvaluateConfig, folder: Path) -> Outcome:
    listener = Listener(uuid.uuid4().hex)
    # a little longer than the ranks' own bound, after which each writes its stacks
    watch = MonitorOptions(listener.on_line, 1.1 * settings.run.hang_seconds, listener.alive)
    try:
        start = Launch.from_plan(job.plan, folder, settings.engine.master_port)
        return listener.outcome(run_launcher(start, ["--score", job.to_token()], watch, listener.mark))
    except KeyboardInterrupt:
        raise Interrupted("Interrupted.") from None
    finally:
        listener.bar.close()


def scores_table(found: dict[str, Any], plan: Plan) -> str:
    """One line a number; predicted against measured where both are known."""
    rows = [
        ["tokens scored", str(found["tokens"])],
        ["loss (nats per token)", f"{found['nats_per_token']:.5f}"],
        ["perplexity per token", f"{found['perplexity_per_token']:.4f}"],
        ["perplexity per word", f"{found['perplexity_per_word']:.4g}"],
    ]
    if "kl_nats_per_token" in found:
        rows += [
            ["perplexity per token at 16 bits", f"{found['reference']['perplexity_per_token']:.4f}"],
            ["KL to 16 bits (nats per token)", f"{found['kl_nats_per_token']:.6f}"],
            ["same most likely token as 16 bits", f"{found['top1_agreement']:.2%}"],
        ]
    if increase := found.get("loss_increase"):
        measured = f"{increase['measured']:.6f} +- {increase['standard_error']:.6f}"
        rows += [["loss increase, measured", measured]]
        rows += [["loss increase, predicted", f"{increase['predicted']:.6f} ({increase['predicted_from']})"]]
    return format_table(["", "value"], rows)


def tasks_table(tasks: dict[str, dict[str, Any]]) -> str:
    rows = [
        [task, name.partition(",")[0], f"{value:.4f}"]
        for task, values in tasks.items()
        for name, value in values.items()
        if isinstance(value, float) and "stderr" not in name
    ]
    return format_table(["task", "metric", "value"], rows)
