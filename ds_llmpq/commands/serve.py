"""`serve`: one rank of a plan's pipeline. The deepspeed launcher starts it on every device; `run` starts the launcher.

To start it by hand, use the line that `plan` prints: `deepspeed --hostfile PLAN/hostfile --include ... --module
ds_llmpq.commands.serve plan=PLAN/plan.json input=FILE output=DIR`.
"""

from __future__ import annotations

import gc
import os
import sys

from ds_llmpq.engine.openmp import wait_briefly
from ds_llmpq.errors import PortTaken, UserError
from ds_llmpq.launch.environment import choose_accelerator, read_rank
from ds_llmpq.launch.failures import PORT, report_failure
from ds_llmpq.launch.heartbeat import dump_stacks_on_signal, exit_if_parent_dies
from ds_llmpq.launch.progress import ERROR_MARK
from ds_llmpq.quant.onednn_kernels import bound_caches
from ds_llmpq.serving.job import Job
from ds_llmpq.versions import check_versions

SOME_FAILED = 3  # exit code: all rows are accounted for, some in errors.jsonl


def main(arguments: list[str] | None = None) -> int:
    """Runs this rank and returns its exit code. What ended it is one line in the output, which the parent looks for."""
    job: Job | None = None
    try:
        check_versions()  # this host may have other versions than the one where `run` was started
        job = _read_job(list(sys.argv[1:] if arguments is None else arguments))
        return _serve(job)
    except UserError as error:
        if not isinstance(error, PortTaken) or job.engine.master_port:
            sys.stderr.write(f"{ERROR_MARK}{error}\n")  # in one piece: the ranks share the stream
            return error.exit_code
        report_failure(error, job.plan, not job.supervised, PORT)
    except (Exception, SystemExit) as error:
        report_failure(error, job and job.plan, job is not None and not job.supervised)
    return 1


def _read_job(arguments: list[str]) -> Job:
    # the launcher adds a local rank, which the plan knows better
    own = [argument for argument in arguments if not argument.startswith("--local_rank")]
    if len(own) == 2 and own[0] == "--job":
        return Job.from_token(own[1])
    # started by hand: what Hydra needs to load, a supervised rank does not wait for
    from ds_llmpq import config
    from ds_llmpq.serving.config import ServeConfig

    return Job.from_config(config.to_object(config.compose_settings("serve", own), ServeConfig))


def _serve(job: Job) -> int:
    job.plan.require_deployment()
    if job.supervised:
        exit_if_parent_dies()
    dump_stacks_on_signal()
    read_rank(job.plan)  # what is wrong is said before torch is imported
    # torch and deepspeed read these when they are imported
    choose_accelerator(job.plan.stages[0].kind)
    wait_briefly()
    bound_caches(job.plan.stages[0].kernel)
    from ds_llmpq.quant.hqq_import import import_hqq

    import_hqq()
    from ds_llmpq.serving.rank import serve

    gc.freeze()  # what was imported stays: a million objects, which each full collection would look through
    metrics = serve(job)
    if metrics is None or job.supervised:
        return 0
    return SOME_FAILED if metrics["counts"]["failed"] else 0


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All files are closed. A regular exit of torch takes seconds, during which other ranks wait to see a failure.
    os._exit(exit_code)
