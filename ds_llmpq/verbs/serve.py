"""`serve`: one rank of a plan's pipeline. The deepspeed launcher starts it on every device; `run` starts the launcher.

By hand: `deepspeed --hostfile PLAN/hostfile --include ... --module ds_llmpq.verbs.serve plan=PLAN/plan.json
input=FILE output=DIR`, with the line that `plan` prints.
"""

from __future__ import annotations

import os
import sys
import traceback

from ds_llmpq import config
from ds_llmpq.batch.job import Job
from ds_llmpq.batch.ordering import checked
from ds_llmpq.batch.progress import ERROR_MARK, MEMORY_MARK
from ds_llmpq.engine.lifeline import end_with_listener, stacks_on_request
from ds_llmpq.engine.openmp import wait_as_stage_needs
from ds_llmpq.engine.ranks import launched_rank
from ds_llmpq.errors import UserError
from ds_llmpq.planner.plan import Plan
from ds_llmpq.planner.planfile import read_plan
from ds_llmpq.schema import ServeVerb
from ds_llmpq.versions import check_versions

SOME_FAILED = 3  # exit code: all rows are accounted for, some in errors.jsonl


def main(arguments: list[str] | None = None) -> int:
    """Exit code of this rank; says a mistake in one line that the parent finds in the launcher's output."""
    try:
        check_versions()  # those of this host, which may be others than where `run` was started
        given = list(sys.argv[1:] if arguments is None else arguments)
        if "--score" in given:
            return _score(given[given.index("--score") + 1])
        return _serve(_job(given))
    except UserError as error:
        sys.stderr.write(f"{ERROR_MARK}{error}\n")  # in one piece: the ranks share the stream
        return error.exit_code
    except Exception as error:
        traceback.print_exc()  # for launcher.log
        from ds_llmpq.engine.memory import ran_out

        if ran_out(error):
            sys.stderr.write(f"{MEMORY_MARK}\n")
        return 1


def _job(arguments: list[str]) -> Job:
    # the launcher puts its own idea of the local rank first; the plan knows better
    own = [argument for argument in arguments if not argument.startswith("--local_rank")]
    if len(own) == 2 and own[0] == "--job":
        return Job.from_token(own[1])
    settings = config.to_object(config.composed("serve", own), ServeVerb)
    for name in ("plan", "input", "output"):
        if not getattr(settings, name):
            raise UserError(f"serve needs {name}=...; give plan=FILE input=FILE output=DIR.")
    plan = read_plan(settings.plan)
    model_path = settings.quantized or settings.model.path or (plan.model or {}).get("path")
    if not model_path:
        raise UserError(f"{settings.plan} names no model; give model.path=DIR.")
    return Job(
        plan=plan,
        model_path=str(config.absolute(model_path)),
        input=str(config.absolute(settings.input)),
        output=str(config.absolute(settings.output)),
        engine=settings.engine,
        batch=checked(settings.batch),
        trust_remote_code=settings.model.trust_remote_code,
    )


def _score(token: str) -> int:
    """One rank of `evaluate`, which starts the same module."""
    from ds_llmpq.evaluation.job import ScoreJob

    job = ScoreJob.from_token(token)
    end_with_listener()
    stacks_on_request()
    _before_torch(job.plan)
    from ds_llmpq.engine.distributed import join, leave
    from ds_llmpq.evaluation.rank import evaluate

    evaluate(job, join(job.plan, job.engine.timeout_seconds))
    leave()
    return 0


def _serve(job: Job) -> int:
    if job.plan.engine is None:
        raise UserError("The plan was made from plain data and names no devices; plan with cluster=... and model=...")
    if job.supervised:
        end_with_listener()
    stacks_on_request()
    _before_torch(job.plan)
    from ds_llmpq.batch.serving import serve
    from ds_llmpq.engine.distributed import join, leave

    metrics = serve(job, join(job.plan, job.engine.timeout_seconds))
    leave()  # not after a failure: the others may be waiting, and a closed connection tells them at once
    if metrics is None or job.supervised:
        return 0
    return SOME_FAILED if metrics["counts"]["failed"] else 0


def _before_torch(plan: Plan) -> None:
    """What must be known before torch takes its seconds, or is read when it or deepspeed is imported."""
    rank = launched_rank(plan)
    os.environ["DS_ACCELERATOR"] = plan.engine["stages"][0]["kind"]
    wait_as_stage_needs(plan, rank)


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All files are closed. Taking torch apart would need seconds, and after a failure the others wait to see it.
    os._exit(exit_code)
