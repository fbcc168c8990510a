"""`serve`: one rank of a plan's pipeline. The deepspeed launcher starts it on every device; `run` starts the launcher.

By hand: `deepspeed --hostfile PLAN/hostfile --include ... --module ds_llmpq.commands.serve plan=PLAN/plan.json
input=FILE output=DIR`, with the line that `plan` prints.
"""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import replace

from ds_llmpq import config
from ds_llmpq.commands.config import ServeConfig
from ds_llmpq.engine.openmp import wait_as_stage_needs
from ds_llmpq.errors import PortTaken, UserError
from ds_llmpq.launch.environment import choose_accelerator, read_rank
from ds_llmpq.launch.failures import PORT, build_failure, identify_rank
from ds_llmpq.launch.heartbeat import dump_stacks_on_signal, exit_if_parent_dies
from ds_llmpq.launch.progress import ERROR_MARK
from ds_llmpq.plan import Plan, read_plan
from ds_llmpq.serving.job import Job
from ds_llmpq.serving.ordering import validate_batch
from ds_llmpq.versions import check_versions

SOME_FAILED = 3  # exit code: all rows are accounted for, some in errors.jsonl


def main(arguments: list[str] | None = None) -> int:
    """Exit code of this rank; says what ended it in one line that the parent finds in the launcher's output."""
    job: Job | None = None
    try:
        check_versions()  # those of this host, which may be others than where `run` was started
        job = _read_job(list(sys.argv[1:] if arguments is None else arguments))
        return _serve(job)
    except PortTaken as error:
        return _refuse(error) if job.engine.master_port else _fail(job, error, PORT)
    except UserError as error:
        return _refuse(error)
    except (Exception, SystemExit) as error:
        return _fail(job, error)


def _refuse(error: UserError) -> int:
    sys.stderr.write(f"{ERROR_MARK}{error}\n")  # in one piece: the ranks share the stream
    return error.exit_code


def _fail(job: Job | None, error: BaseException, kind: str | None = None) -> int:
    """The traceback is for launcher.log, the line after it for `run`, or for who started this by hand."""
    traceback.print_exception(error)
    failure = build_failure(error, **identify_rank(job.plan if job else None))
    failure = replace(failure, kind=kind) if kind else failure
    by_hand = job is not None and not job.supervised
    sys.stderr.write(f"{ERROR_MARK}{failure.describe()}\n" if by_hand else failure.to_line())
    return 1


def _read_job(arguments: list[str]) -> Job:
    # the launcher puts its own idea of the local rank first; the plan knows better
    own = [argument for argument in arguments if not argument.startswith("--local_rank")]
    if len(own) == 2 and own[0] == "--job":
        return Job.from_token(own[1])
    settings = config.to_object(config.compose_settings("serve", own), ServeConfig)
    for name in ("plan", "input", "output"):
        if not getattr(settings, name):
            raise UserError(f"serve needs {name}=...; give plan=FILE input=FILE output=DIR.")
    plan = read_plan(settings.plan)
    model_path = settings.quantized or settings.model.path or plan.model_path
    if not model_path:
        raise UserError(f"{settings.plan} names no model; give model.path=DIR.")
    return Job(
        plan=plan,
        model_path=str(config.make_absolute(model_path)),
        input=str(config.make_absolute(settings.input)),
        output=str(config.make_absolute(settings.output)),
        engine=settings.engine,
        batch=validate_batch(settings.batch),
        trust_remote_code=settings.model.trust_remote_code,
    )


def _serve(job: Job) -> int:
    if not job.plan.is_deployed:
        raise UserError("The plan was made from plain data and names no devices; plan with cluster=... and model=...")
    if job.supervised:
        exit_if_parent_dies()
    dump_stacks_on_signal()
    _before_torch(job.plan)
    from ds_llmpq.quant.hqq_import import import_hqq

    import_hqq()
    from ds_llmpq.engine.rank_context import init_rank, shutdown
    from ds_llmpq.serving.rank import serve

    metrics = serve(job, init_rank(job.plan, job.engine.timeout_seconds))
    shutdown()  # not after a failure: the others may be waiting, and a closed connection tells them at once
    if metrics is None or job.supervised:
        return 0
    return SOME_FAILED if metrics["counts"]["failed"] else 0


def _before_torch(plan: Plan) -> None:
    """What must be known before torch takes its seconds, or is read when it or deepspeed is imported."""
    rank = read_rank(plan)
    choose_accelerator(plan.stages[0].kind)
    wait_as_stage_needs(plan, rank)


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All files are closed. Taking torch apart would need seconds, and after a failure the others wait to see it.
    os._exit(exit_code)
