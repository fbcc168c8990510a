"""One command for a GPU: does the engine compute what it should there, and how near to the card's limit is it.

    python scripts/bench/gpu.py --minutes 5 --out DIR
    python scripts/bench/gpu.py --quick --out DIR                      (90 seconds)
    python scripts/bench/gpu.py --device cpu --tiny --out DIR          (the same code on a small model, no GPU)

Needs torch with CUDA, transformers and, for the batches, deepspeed; runs from a checkout that is not installed, and
downloads nothing (docs/gpu.md). It ends within its minutes and keeps what it has: DIR/results.jsonl as it goes,
DIR/table.md at the end. Exit code 1: a check failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import shutil
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

try:
    import torch
    from gpu_bars import write_bars
    from gpu_batches import check_engine, run_batches, run_two_stages, write_model
    from gpu_checks import check_families, check_kernels
    from gpu_pages import check_pages, run_both_caches, time_pages
    from gpu_run import Run, environment, is_lost, write_table
    from gpu_speed import measure_ceilings, time_passes, time_transformers
except ModuleNotFoundError as missing:
    sys.exit(f"gpu.py needs {missing.name}, which cannot be imported here; docs/gpu.md says what to carry")

QUICK_MINUTES = 1.5
GRACE_SECONDS = 4.0  # before the end, when whatever still runs is left
# (section, share of the whole time that it may take at most); what most bars are about comes before what may be cut off
SHARES = {
    "ceilings": 0.04, "families": 0.12, "kernels": 0.14, "engine": 0.08, "model": 0.12, "16 bits": 0.22, "batches": 0.2,
    "4 bits": 0.16, "pages": 0.08, "both caches": 0.12, "transformers": 0.1, "two stages": 0.15, "8 bits": 0.14,
    "transformers, compiled": 0.3,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--sections", nargs="+", choices=[*SHARES], default=[*SHARES])
    parser.add_argument("--again", nargs=2, help=argparse.SUPPRESS)  # see `start_again`
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print("no CUDA device can be used here; --device cpu --tiny tries the script without one", file=sys.stderr)
            return 2
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        torch.set_num_threads(1)
    seconds = 60 * (QUICK_MINUTES if options.quick else options.minutes)
    began = float(options.again[1]) if options.again else None
    run = Run(options.out, device, options.tiny, seconds - GRACE_SECONDS, began)
    os.environ["DS_ACCELERATOR"] = device.type
    folder = (
        options.again[0] if options.again else tempfile.mkdtemp(prefix="gpu-bench-", dir=roomy_folder(options.tiny))
    )
    folder, left = Path(folder), max(1.0, run.ends - time.monotonic())
    watch = threading.Timer(left + GRACE_SECONDS / 2, lambda: end_now(run, folder))
    watch.daemon = True
    watch.start()
    faulthandler.dump_traceback_later(left + GRACE_SECONDS, exit=True)  # if something holds Python's lock until then
    try:
        run_sections(run, options.sections if options.again else complete(options.sections), folder, seconds)
    finally:
        faulthandler.cancel_dump_traceback_later()
        watch.cancel()
        shutil.rmtree(folder, ignore_errors=True)
    if run.is_over:
        watch.join()  # it concludes, and ends the process
    return conclude(run)


def complete(sections: list[str]) -> list[str]:
    """In order, with those that they need."""
    wanted = set(sections)
    if not wanted <= {"ceilings", "families", "kernels", "pages"}:
        wanted.add("ceilings")
    if not wanted <= {"ceilings", "families", "kernels", "pages", "engine"}:
        wanted.add("model")
    return [name for name in SHARES if name in wanted]


def run_sections(run: Run, sections: list[str], folder: Path, seconds: float) -> None:
    actions = {
        "ceilings": measure_ceilings,
        "families": check_families,
        "kernels": check_kernels,
        "engine": check_engine,
        "model": partial(write_model, folder=folder),
        "16 bits": partial(time_passes, folder=folder, bits=16, further=time_pages),
        "batches": partial(run_batches, folder=folder),
        "4 bits": partial(time_passes, folder=folder, bits=4),
        "pages": check_pages,
        "both caches": partial(run_both_caches, folder=folder),
        "transformers": partial(time_transformers, folder=folder, compiled=False),
        "two stages": partial(run_two_stages, folder=folder),
        "8 bits": partial(time_passes, folder=folder, bits=8),
        "transformers, compiled": partial(time_transformers, folder=folder, compiled=True),
    }
    if not run.lines:
        with run.section("environment", 1.0, seconds):
            run.add("this machine", **environment(run))
    for place, name in enumerate(sections, 1):
        with run.section(name, SHARES[name], seconds):
            if run.left() <= 0:
                run.add("left out: time is up", "none")
            else:
                actions[name](run)
        if sections[place:] and is_lost(run.device):
            start_again(run, sections[place:], folder, seconds)


def start_again(run: Run, sections: list[str], folder: Path, seconds: float) -> None:
    """The sections that are left, in a new process in the place of this one: CUDA's errors (an illegal address, a
    failed assertion) stay, and would fail them all."""
    run.add("the device is in an error; the next sections run in a new process", "none")
    run.close()
    sys.stdout.flush()
    options = ["--minutes", str(seconds / 60), "--out", str(run.out), "--device", run.device.type]
    options += ["--tiny"] if run.tiny else []
    options += ["--again", str(folder), str(run.began), "--sections", *sections]
    os.execv(sys.executable, [sys.executable, str(Path(__file__).resolve()), *options])


def conclude(run: Run) -> int:
    checks = [line["ok"] for line in run.lines if "ok" in line]
    with run.section("bars", 1.0, 0.0):
        write_bars(run)
    with run.section("checks", 1.0, 0.0):
        run.add("passed", passed=sum(checks), of=len(checks))
    print("\n" + write_table(run))
    run.close()
    return 0 if all(checks) else 1


def end_now(run: Run, folder: Path) -> None:
    """The time is over and something still runs, which is given up: what is measured is on disk already."""
    run.give_up()
    run.add("stopped: time is up", "none")
    code = conclude(run)
    shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()
    os._exit(code)


def roomy_folder(tiny: bool) -> str | None:
    """Memory, where it has room for the model's files: 16 GB written and read in seconds."""
    shared = Path("/dev/shm")
    if not tiny and shared.is_dir() and shutil.disk_usage(shared).free > 24 << 30:
        return str(shared)
    return None


if __name__ == "__main__":
    sys.exit(main())
