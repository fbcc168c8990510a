"""Runs an evaluation: plans if needed, starts DeepSpeed on the plan's hosts, and compares with full precision."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from ds_llmpq.cluster.hostfile import write_hostfile
from ds_llmpq.errors import Interrupted, RunFailed
from ds_llmpq.evaluation.config import SCORES_NAME, EvaluationConfig, ScoringTask
from ds_llmpq.files import make_absolute, open_regular, read_json, write_json
from ds_llmpq.launch.attempt import MISTAKE, run_attempt
from ds_llmpq.launch.config import validate_supervision
from ds_llmpq.launch.launcher import LOG_NAME, Launch
from ds_llmpq.launch.process_monitor import ExitReason
from ds_llmpq.plan import Quantization, launch_order, write_plan
from ds_llmpq.quant.packing import UNQUANTIZED_BITS
from ds_llmpq.serving.batch_run import choose_model, find_checkpoint, obtain_plan
from ds_llmpq.serving.config import EvaluateConfig
from ds_llmpq.serving.job import Job
from ds_llmpq.serving.planning import Progress
from ds_llmpq.validation import check_least


def run_evaluation(settings: EvaluateConfig, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Scores a text, or tasks, on the plan's pipeline; writes `out`/scores.json and returns its content. `settings` has
    its cluster already (`config.load_cluster`). `UserError`: a mistake, or the run failed."""
    settings = choose_model(settings)
    validate_supervision(settings.run)
    task = ScoringTask(_locate(settings.evaluation))
    out.mkdir(parents=True, exist_ok=True)
    plan = obtain_plan(settings, out, progress)
    job = Job(
        plan=plan,
        model_path=str(find_checkpoint(settings, plan)),
        input=None,
        output=str(out),
        engine=settings.engine,
        scoring=task,
        trust_remote_code=settings.model.trust_remote_code,
        supervised=True,
        hang_seconds=settings.run.hang_seconds,
    )
    compares = settings.evaluation.reference and not settings.evaluation.tasks
    return _compare(job, settings, out) if compares else _score(job, out)


def _locate(evaluation: EvaluationConfig) -> EvaluationConfig:
    """The settings with absolute paths, for the ranks. A text that cannot be read, and a count that is too small, are
    refused before they start."""
    least = {"row_tokens": 1, "limit_tokens": 1, "reference_bytes": 0, "fewshot": 0, "limit_documents": 1}
    check_least("evaluation", evaluation, **least)
    paths = {name: getattr(evaluation, name) for name in ("text", "tasks_path")}
    evaluation = replace(
        evaluation, **{name: str(make_absolute(path)) for name, path in paths.items() if path is not None}
    )
    if evaluation.text is not None:
        open_regular(evaluation.text, "text", "give a plain text file in UTF-8").close()
    return evaluation


def _compare(job: Job, settings: EvaluateConfig, out: Path) -> dict[str, Any]:
    """Scores the plan with nothing quantized first, then the plan itself, compared with that; a plan that quantizes
    nothing once."""
    file, folder = out / "reference.f32", out / "reference"
    full = replace(
        job.plan,
        stages=tuple(replace(stage, bits=(UNQUANTIZED_BITS,) * len(stage.bits)) for stage in job.plan.stages),
        quant=replace(job.plan.quant or Quantization(), lm_head_bits=UNQUANTIZED_BITS),
    )
    unquantized = replace(
        job,
        plan=full,
        model_path=str(find_checkpoint(replace(settings, quantized=None), full)),
        output=str(folder),
        scoring=replace(job.scoring, reference=str(file), keeps_reference=True),
    )
    if full.stages == job.plan.stages and job.plan.lm_head_bits == UNQUANTIZED_BITS:
        reference = found = _score(job, out)
    else:
        folder.mkdir(exist_ok=True)
        try:
            reference = _score(unquantized, folder)
            found = _score(replace(job, scoring=replace(job.scoring, reference=str(file))), out)
        finally:
            file.unlink(missing_ok=True)
    origins = job.plan.provenance
    pairs = [a - b for a, b in zip(reference["logprobs"], found["logprobs"], strict=True)]
    mean = math.fsum(pairs) / len(pairs)
    variance = math.fsum((value - mean) ** 2 for value in pairs) / len(pairs)
    found |= {
        "reference": {key: reference[key] for key in ("nats_per_token", "perplexity_per_token", "perplexity_per_word")},
        "loss_increase": {
            "measured": mean,
            "standard_error": math.sqrt(variance / len(pairs)),
            "predicted": job.plan.predicted.quality_loss,
            "predicted_interval": job.plan.quality_loss_interval,
            "predicted_from": origins.get("sensitivity") or origins.get("omega", "unknown"),  # the latter: former plans
        },
    }
    write_json(out / SCORES_NAME, found)
    return found


def _score(job: Job, folder: Path) -> dict[str, Any]:
    """Runs one job under the launcher; `RunFailed` with what a rank named, or how the launcher ended."""
    write_plan(folder / "plan.json", job.plan)
    write_hostfile(folder / "hostfile", launch_order(job.plan))
    file = folder / SCORES_NAME
    file.unlink(missing_ok=True)  # of an earlier evaluation
    launch = Launch.from_plan(job.plan, folder, job.engine.master_port)
    try:
        outcome = run_attempt(launch, job.to_token(), job.hang_seconds)
    except KeyboardInterrupt:
        raise Interrupted("Interrupted.") from None
    if outcome.exit.reason is ExitReason.ENDED and file.exists():
        return read_json(file, "Scores", "evaluate again", infinity=True)
    if outcome.kind == MISTAKE:
        sentence = outcome.failure.message
    else:
        why = outcome.explain(job.hang_seconds)
        sentence = f"{why[:1].upper()}{why[1:]}; what the ranks said is in {folder / LOG_NAME}."
    raise RunFailed(sentence, outcome.record())
