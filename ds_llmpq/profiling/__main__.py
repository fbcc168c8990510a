"""`python -m ds_llmpq.profiling SPEC`: a trial pipeline, or one rank of it (`trial.py`)."""

import json
import os
import sys

from ds_llmpq.engine.openmp import wait_briefly
from ds_llmpq.quant.hqq_import import import_hqq

wait_briefly()
import_hqq()

from ds_llmpq.profiling import trial  # noqa: E402  (it imports HQQ)

if __name__ == "__main__":
    run = trial.main if "RANK" in os.environ else trial.fork_ranks
    code = run(json.loads(sys.argv[1])) or 0
    sys.stdout.flush()
    os._exit(code)  # tearing down what was imported takes almost a second, in which the user waits
