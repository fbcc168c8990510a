"""Every loader of what comes from elsewhere, each with a valid file to begin from and with how it is damaged."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from mutations import (
    exhaustive_json,
    exhaustive_lines,
    exhaustive_table,
    mutated_bytes,
    mutated_document,
    mutated_lines,
    mutated_overrides,
    special_files,
)

from ds_llmpq import config
from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.batch.jsonl_file import read_error_keys
from ds_llmpq.batch.reader import read_requests
from ds_llmpq.batch.results import ResultWriter, read_finished
from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.hostfile import find_hostfile_disagreements, parse_hostfile
from ds_llmpq.cluster.saved import parse_saved_gpus
from ds_llmpq.cost.fit import Fit, LatencyModel, Residual, read_model
from ds_llmpq.cost.linktable import fit_link, read_links
from ds_llmpq.cost.profile import read_profile
from ds_llmpq.engine.config import EngineConfig
from ds_llmpq.errors import UserError, make_printable
from ds_llmpq.evaluation.config import EvaluationConfig, ScoringTask
from ds_llmpq.files import read_json, read_text
from ds_llmpq.launch.failures import FAILURE_MARK, Failure, read_failure
from ds_llmpq.launch.journal import Journal
from ds_llmpq.launch.launcher import Launch, build_command, build_environment
from ds_llmpq.launch.progress import PROGRESS_MARK, parse_progress
from ds_llmpq.lengths import dataset
from ds_llmpq.lengths.predictor import load_predictor
from ds_llmpq.lengths.records import read_examples
from ds_llmpq.models.fingerprint import fingerprint
from ds_llmpq.models.generation import load_generation
from ds_llmpq.models.shape import read_shape
from ds_llmpq.plan import Plan, check_model, launch_order, read_assignment, read_plan
from ds_llmpq.planner import Problem
from ds_llmpq.report.answers import show_answers
from ds_llmpq.report.plan_table import format_plan
from ds_llmpq.report.sweep import format_summary, read_point
from ds_llmpq.report.sweep_cache import is_done
from ds_llmpq.report.traces import read_trace as read_spans
from ds_llmpq.research.arrivals import read_trace
from ds_llmpq.research.published_ssjf import read_cases, schedules
from ds_llmpq.sensitivity.table import Sensitivity, read_sensitivity, write_sensitivity
from ds_llmpq.serving.in_flight import read_in_flight
from ds_llmpq.serving.job import Job

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
_MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
_ROWS = [
    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
     "body": {"model": "m", "messages": _MESSAGES, "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 3}},
    {"custom_id": "b", "method": "POST", "url": "/v1/completions",
     "body": {"prompt": "def f(", "stop": ["\n", "x"], "top_k": 5, "ignore_eos": True, "n": 1, "stream": False}},
    {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"prompt": [1, 2, 3], "user": "u"}},
]  # fmt: skip
_RESULT = {"id": "batch_req_1", "custom_id": "a", "response": {"status_code": 200, "body": {}}, "error": None}
_OVERRIDES = [
    "quant.bits=[4,8]", "workload.sequences=4", "planner.mode=theta", "planner.theta=0.5", "planner.pins={bits:{0:4}}",
    "cluster=mixed_gpus", "model=llama3_8b", "batch.temperature=0.5", "engine.dtype=float32", "out=somewhere",
    "input=file.jsonl", "model.path=folder", "run.restarts=2", "resume=force", "cluster.hosts=[{name: a}]",
    "planner.micro_batches.prefill=[1,2]", "+experiment=demo", "cluster.env={A: b}", "quant.group_size=64",
    "quant.per_channel_bits=[8]",
]  # fmt: skip
_LINK = {"latency_seconds": 1e-5, "bandwidth_bytes_per_second": 1e9}
_CLUSTER = {
    "name": "two",
    "device_types": {
        "cpu_core": {"kind": "cpu", "memory_bytes": 10**9, "memory_bandwidth_bytes_per_second": 1e10,
                     "flops_per_second": {"float32": 1e11}, "kernel_overhead_seconds": 1e-4, "bits": [4, 8, 16]},
    },
    "hosts": [{"name": "nodeA", "devices": [{"type": "cpu_core", "slot": 0, "threads": 1, "cpu_share": 0.5},
                                            {"type": "cpu_core", "slot": 1, "memory_bytes": 5 * 10**8}]}],
    "links": {"intra_host": _LINK, "pairs": [{"source": "nodeA:0", "target": "nodeA:1", **_LINK}]},
    "env": {"GLOO_SOCKET_IFNAME": "eth0"},
}  # fmt: skip


@dataclass(frozen=True)
class Loader:
    """`seed`: a valid file's bytes. `name`: of the file in a folder of its own. `load(file)` returns or raises
    `UserError`. `weight`: its share of all inputs; slow ones get less."""

    seed: bytes
    name: str
    load: Callable[[Path], object]
    mutate: Callable[[random.Random, bytes], bytes]
    weight: int = 10
    every: Callable[[bytes], Iterator[bytes]] | None = None  # each place with each odd value; None: as by `mutate`

    def all_inputs(self) -> Iterator[bytes]:
        """Damaged files: what any file can be, and each place of the valid one with each odd value."""
        every = self.every or {mutated_document: exhaustive_json, mutated_lines: exhaustive_lines}.get(self.mutate)
        return chain(special_files(self.seed), every(self.seed) if every else ()) if self.seed else iter(())


def all_loaders(folder: Path) -> dict[str, Loader]:
    """Valid files are made in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    plan, problem = _planned(folder / "plan")
    decisions = {
        "stages": [{"device": stage["device"], "layers": stage["layers"], "bits": 4} for stage in plan["stages"]],
        "micro_batch": plan["micro_batch"],
    }  # fmt: skip
    write_sensitivity(
        folder / "sensitivity.json", Sensitivity("variance", "fitted", (4, 8, 16), ((0.1, 0.01, 0.0),) * 8)
    )
    checkpoint = _small_checkpoint(folder / "checkpoint")
    rows = b"".join(json.dumps(row).encode() + b"\n" for row in _ROWS)
    plain = json.dumps(plan).encode()
    return {
        "batch": Loader(rows, "rows.jsonl", _batch, mutated_lines, 30),
        "plan": Loader(plain, "plan.json", _plan, mutated_document, 25),
        "assignment": Loader(json.dumps(decisions).encode(), "assignment.json", read_assignment, mutated_document),
        "problem": Loader(json.dumps(problem).encode(), "problem.json", _problem, mutated_document, 20),
        "sensitivity": Loader((folder / "sensitivity.json").read_bytes(), "sensitivity.json", read_sensitivity,
                              mutated_document),
        "hostfile": Loader(b"# mine\nnodeA slots=2\nnodeB  slots=1 # GPU\n\n", "hostfile", _hostfile, mutated_bytes),
        "profile": Loader(_profile(folder / "profile.csv"), "profile.csv", _profile_table, mutated_bytes,
                          every=exhaustive_table),
        "links": Loader(_links(), "links.csv", _link_table, mutated_bytes, every=exhaustive_table),
        "latency": Loader(_latency(folder / "latency.json"), "latency.json", _latency_model, mutated_document, 6),
        "cluster": Loader(json.dumps(_CLUSTER).encode(), "cluster.yaml", _cluster, mutated_document, 6),
        "overrides": Loader(b"", "overrides.json", _compose, _overrides, 6),
        "config.json": Loader((checkpoint / "config.json").read_bytes(), "config.json", _shape_of(checkpoint),
                              mutated_document, 12),
        "checkpoint": Loader((checkpoint / "config.json").read_bytes(), "config.json",
                             read_checkpoint(checkpoint, "config.json"), mutated_document, 6),
        "index": Loader(_index(checkpoint), "model.safetensors.index.json",
                        read_checkpoint(checkpoint, "model.safetensors.index.json"), mutated_document, 6),
        "safetensors": Loader((checkpoint / "model.safetensors").read_bytes(), "model.safetensors",
                              read_checkpoint(checkpoint, "model.safetensors"), _mutated_header, 6,
                              every=_every_header),
        "quantized": Loader(_quantized(checkpoint), "config.json", read_checkpoint(checkpoint, "config.json", True),
                            mutated_document, 6),
        "generation": Loader(_GENERATION, "generation_config.json", _generation_of(checkpoint), mutated_document, 6),
        "tokenizer": Loader(_small_tokenizer(), "tokenizer.json", _tokenizer, mutated_document, 1),
        "journal": Loader(_journal(), "run.json", lambda file: Journal.read(file.parent), mutated_document),
        "results": Loader(json.dumps(_RESULT).encode() + b"\n", "results.jsonl", _results, mutated_lines),
        "job": Loader(_token(folder / "plan" / "plan.json"), "token", _job, _mutated_token, 6, _every_token),
        "score job": Loader(_score_token(folder / "plan" / "plan.json"), "token", _job, _mutated_token, 6,
                            _every_token),
        "predictor": Loader(_predictor(folder / "predictor"), "predictor.json", _predictor_of(folder / "predictor"),
                            mutated_document, 6),
        "manifest": Loader(_manifest(checkpoint), "quantized.json", _quantized_of(checkpoint), mutated_document, 6),
        "metrics": Loader(_metrics(plan), "metrics.json", partial(_report, plan), mutated_document, 2),
        "scores": Loader(_SCORES, "scores.json", partial(_report, plan), mutated_document, 2),
        "spans": Loader(_SPANS, "trace.json", read_spans, mutated_document, 6),
        "failure": Loader(b'{"message": "no plan", "exit_code": 2}', "failure.json",
                          lambda file: format_summary([read_point(file.parent)]), mutated_document, 6),
        "arrivals": Loader(_ARRIVALS, "trace.csv", read_trace, mutated_bytes, 6, exhaustive_table),
        "answers": Loader(_ANSWERS, "answers.jsonl", _answers, mutated_lines, 6),
        "cases": Loader(_CASES, "cases.json", lambda file: [schedules(case) for case in read_cases(file)],
                        mutated_document, 6),
        "dataset": Loader(_dataset(folder / "dataset"), "records.jsonl", _dataset_of(folder / "dataset"),
                          mutated_lines, 6),
        "gpus": Loader(_GPUS, "gpus.csv", _gpus, mutated_bytes, 6, exhaustive_table),
        "pins": Loader(_PINS, "pins.json", partial(_pins, plan, problem), mutated_document, 6),
        "answers.csv": Loader(b"prompt,response,model\na b,c d,m\ne,f,m\n", "rows.csv", read_examples, mutated_bytes, 6,
                              exhaustive_table),
        "errors": Loader(_ERRORS, "errors.jsonl", read_error_keys, mutated_lines, 6),
        "in flight": Loader(_IN_FLIGHT, "in_flight.jsonl", _in_flight, mutated_lines, 6),
        "progress lines": Loader(_PROGRESS, "progress", _marked(PROGRESS_MARK, parse_progress), mutated_lines, 6),
        "failure lines": Loader(_FAILURES, "failure", _marked(FAILURE_MARK, read_failure), mutated_lines, 6),
        "kept rows": Loader(_KEPT_ROWS, "progress.json", _kept_rows, mutated_document, 6),
        "kept states": Loader(_kept_states(folder / "states"), "progress.safetensors", _kept_rows, _mutated_header, 6,
                              every=_every_header),
        "training state": Loader(_training_state(folder / "training"), "progress.safetensors", _resumed_training,
                                 _mutated_header, 6, every=_every_header),
        "swept": Loader(b"- planner.theta=2\n- +engine.dtype=float32\n", "overrides.yaml", _swept, mutated_bytes, 6),
        "point": Loader(b'{"command": "run", "digest": "d"}', "point.json", _point, mutated_document, 6),
        "shown answers": Loader(json.dumps(_RESULT).encode() + b"\n", "results.jsonl", _shown, mutated_lines, 6),
        "lengths": Loader(b'{"prompt": "a b", "response": "c d", "model": "m"}\n' * 3, "rows.jsonl", read_examples,
                          mutated_lines, 6),
    }  # fmt: skip


def try_input(loader: Loader, data: bytes, folder: Path) -> str:
    """`ok` or the refusal's sentence; anything else that a loader raises passes on."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / loader.name
    file.write_bytes(data)
    try:
        loader.load(file)
    except UserError as error:
        sentence = str(error)
        assert sentence.strip(), "a refusal without a word"
        assert len(sentence) <= 1_500, "a refusal of many lines"
        assert make_printable(sentence) == sentence, "a refusal with control characters"
        return sentence
    finally:
        for each in folder.iterdir():
            shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
    return "ok"


class Guard:
    """Notes every file written or made, every program started and every connection made outside `allowed`, by a hook
    of the interpreter itself; only while it is entered."""

    def __init__(self, *allowed: Path):
        self.allowed = [os.path.realpath(path) for path in allowed]
        self.found: list[str] = []
        self.on = False
        sys.addaudithook(self._hook)

    def __enter__(self) -> Guard:
        self.on = True
        return self

    def __exit__(self, *exception: object) -> None:
        self.on = False

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = arguments
            written = mode is not None and set(str(mode)) & set("wax+")
            written = written or (mode is None and isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR))
            if written and not isinstance(path, int):
                self._check(event, path)
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate"):
            path = arguments[1] if event in ("os.rename", "os.link", "os.symlink") else arguments[0]
            if event != "os.truncate" and arguments[-1] > 0:  # below an open folder: so shutil.rmtree removes
                path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), os.fsdecode(path))
            self._check(event, path)
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"):
            self.found.append(f"{event} {arguments!r}"[:300])

    def _check(self, event: str, path: object) -> None:
        if isinstance(path, (str, bytes, os.PathLike)):
            real = os.path.realpath(os.fsdecode(path))
            inside = any(real == root or real.startswith(root + os.sep) for root in self.allowed)
            if not inside and not real.startswith(("/dev/", "/proc/self/")):
                self.found.append(f"{event} {real}"[:300])


# --- the loaders ---

_ERROR = {"code": "bad_row", "message": "No.", "line": 7}
_ERRORS = b"".join(
    json.dumps({"id": "batch_req_1", "custom_id": name, "response": None, "error": _ERROR}).encode() + b"\n"
    for name in ("a", None)
)
_IN_FLIGHT = b"""{"schema": 1, "identity": "%s"}
{"row": 7, "tokens": [1, 2]}
{"rows": [7, 8], "tokens": [3, 4]}
""" % (b"f" * 64)
_PROGRESS = b'{"phase": "serving", "done": 3, "total": 9, "note": "12 tokens/s", "pid": 5}\n'
_FAILURES = json.dumps({
    "kind": "fault", "type": "TypeError", "message": "no", "rank": 1, "stage": 1, "device": "b:0", "host": "b",
    "file": "ds_llmpq/x.py", "line": 3, "function": "f",
}).encode() + b"\n"  # fmt: skip
_KEPT_ROWS = json.dumps({"identity": {"a": 1}, "rows": [[0.1, 0.2]], "by_layer": {"0": [0.5]}}).encode()
_SCORES = b'{"loss_increase": {"predicted": 0.1, "measured": 0.2}, "perplexity": 3.5}'
_SPANS = json.dumps({"traceEvents": [
    {"ph": "X", "pid": 0, "tid": 0, "name": "prefill", "ts": 1.0, "dur": 2.0},
    {"ph": "X", "pid": 1, "tid": 0, "name": "decode", "ts": 3.0, "dur": 2.0}, {"ph": "M", "pid": 0, "name": "n"},
]}).encode()  # fmt: skip
_ARRIVALS = b"""TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:04.0781490,110,27
"""
_ANSWERS = b'{"output_tokens": 5, "prompt_tokens": 3, "predicted_tokens": 4.5}\n{"output_tokens": 7}\n'
_CASES = json.dumps([{
    "mode": "DYNAMIC_BATCHING", "max_batch": 2, "batch_wait_timeout": 10, "arrival": [0.0, 1.0, 2.5],
    "generated_tokens": [3, 4, 5], "predicted_class": [0, 1, 2], "starvation": {"threshold": 100, "coefficient": 10},
}]).encode()  # fmt: skip
_GPUS = b"""index, pci.bus_id, name, memory.total [MiB], memory.free [MiB], compute_cap
0, 00000000:00:04.0, Tesla T4, 15360 MiB, 15000 MiB, 7.5
1, 00000000:00:05.0, Tesla T4, 15360 MiB, 15000 MiB, 7.5
"""
_GENERATION = json.dumps({
    "eos_token_id": [1, 2], "repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "min_p": 0.1, "top_h": 0.9,
    "sequence_bias": [[[3, 4], -1.5]], "bad_words_ids": [[5]], "suppress_tokens": [6], "forced_bos_token_id": 7,
    "exponential_decay_length_penalty": [5, 1.2], "stop_strings": ["x"], "num_beams": 2, "do_sample": True,
}).encode()  # fmt: skip
_PINS = json.dumps({"micro_batch": {"decode": 1}, "order": [], "layers": {}, "bits": {"0": 4}}).encode()


def _profile_table(file: Path) -> object:
    return read_profile(file).measured()


def _latency_model(file: Path) -> object:
    from ds_llmpq.report.fidelity import format_profile, pair_profile

    model = read_model(file)
    pair_profile(model)
    return format_profile(model)


def _marked(mark: str, parse: Callable[[str], object]) -> Callable[[Path], object]:
    """Each line as a rank prints it, behind its host's name; what is no such line is None."""

    def load(file: Path) -> object:
        text = file.read_bytes().decode(errors="replace")
        found = [parse(f"b: {mark}{line}") for line in text.split("\n")]
        return [each.describe() for each in found if isinstance(each, Failure)]

    return load


def _in_flight(file: Path) -> object:
    found = read_in_flight(file.parent, "f" * 64)
    assert all(0 <= token < 1 << 31 for tokens in found.values() for token in tokens), "tokens that are none"
    return found


def _kept_rows(file: Path) -> object:
    import torch

    from ds_llmpq.sensitivity.resume import Progress

    if file.name != "progress.json":
        (file.parent / "progress.json").write_bytes(_KEPT_ROWS)
    progress = Progress(file.parent, {"a": 1})
    return progress.read_rows(), progress.resume(lambda: torch.zeros(1, 2, 3))


def _kept_states(folder: Path) -> bytes:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file({"hidden": torch.zeros(1, 2, 3), "layers": torch.tensor(1)}, folder / "progress.safetensors")
    return (folder / "progress.safetensors").read_bytes()


def _training(folder: Path) -> tuple:
    import numpy as np
    import torch

    from ds_llmpq.lengths.training_state import TrainingState

    modules = {"head": torch.nn.Linear(2, 1)}
    optimizer = torch.optim.AdamW(modules["head"].parameters())
    return TrainingState(folder, {"a": 1}), modules, optimizer, np.random.default_rng(0)


def _training_state(folder: Path) -> bytes:
    state, modules, optimizer, generator = _training(folder)
    modules["head"].weight.sum().backward()
    optimizer.step()
    state.keep(1, modules, optimizer, generator)
    return (folder / "progress.safetensors").read_bytes()


def _resumed_training(file: Path) -> object:
    state, modules, optimizer, generator = _training(file.parent)
    before = {name: value.clone() for name, value in modules["head"].state_dict().items()}
    done = state.resume(modules, optimizer, generator)
    if not done:
        assert all(value.equal(before[name]) for name, value in modules["head"].state_dict().items()), "half put back"
    modules["head"].weight.sum().backward()
    optimizer.step()  # with what was put back
    return done


def _swept(file: Path) -> object:
    (file.parent / ".hydra").mkdir()
    shutil.copyfile(file, file.parent / ".hydra" / "overrides.yaml")
    return format_summary([read_point(file.parent)])


def _point(file: Path) -> object:
    (file.parent / "metrics.json").write_text("{}")
    return is_done(file.parent, "run", "d")


def _shown(file: Path) -> object:
    (file.parent / "rows.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in _ROWS))
    return show_answers(file.parent / "rows.jsonl", file)


def _report(plan: dict, file: Path) -> object:
    from ds_llmpq.report import fidelity, run_report
    from ds_llmpq.report.metrics_file import read_metrics, refuse_other_forms
    from ds_llmpq.report.run_summary import format_run

    found, kept = read_metrics(file), Plan.from_json(plan)
    with refuse_other_forms(file):
        if file.name == "scores.json":
            return run_report._show(found, "loss_increase", "measured")
        (file.parent / "plan.json").write_text(json.dumps(plan))
        format_run(found)
        run_report._summary(kept, found, None)
        timed = run_report._has_timed_passes(found)
    return fidelity.describe_run(file.parent) if timed else found


def _answers(file: Path) -> object:
    from ds_llmpq.research.config import AnswersConfig
    from ds_llmpq.research.scenario import _read

    return _read(AnswersConfig(kind="data", data=str(file)))


def _gpus(file: Path) -> object:
    return parse_saved_gpus(read_text(file, "file of GPUs", "save it again"))


def _pins(plan: dict, problem: dict, file: Path) -> object:
    from ds_llmpq.planner.pins import Pins

    settings = read_json(file, "pins", "mend them")
    return Pins.from_json(settings, Problem.from_json(problem))


def _dataset_of(folder: Path) -> Callable[[Path], object]:
    def load(file: Path) -> object:
        _copied(folder, file)
        return dataset.read(file.parent)

    return load


def _quantized_of(checkpoint: Path) -> Callable[[Path], object]:
    """A quantized folder whose manifest is the damaged file."""

    def load(file: Path) -> object:
        from ds_llmpq.quant.quantized_checkpoint import open_checkpoint

        _copied(checkpoint, file)
        (file.parent / "config.json").write_bytes(_quantized(checkpoint))
        (file.parent / "model.safetensors.index.json").write_bytes(_index(checkpoint))
        fingerprint(file.parent)
        opened = open_checkpoint(file.parent)
        return [tensor.shape for _, tensor in opened.tensors(list(opened._shard_of))]

    return load


def _batch(file: Path) -> object:
    return read_requests(file, BatchConfig(max_row_bytes=60_000))


def _plan(file: Path) -> object:
    """As far as a launch goes without starting anything."""
    plan = read_plan(file)
    format_plan(plan)
    if not plan.is_deployed:
        return plan
    launch = Launch.from_plan(plan, file.parent)
    launch_order(plan)
    build_command(launch, [])
    build_environment(launch)
    check_model(plan, TINY)
    job = Job(plan, "m", "i", "o", EngineConfig(), BatchConfig())
    return Job.from_token(job.to_token())


def _problem(file: Path) -> object:
    return Problem.from_json(json_of(file)).to_json()


def json_of(file: Path) -> object:
    return read_json(file, "Problem", "give a problem.json")


def _hostfile(file: Path) -> object:
    return find_hostfile_disagreements(parse_hostfile(file), [("nodeA", 0), ("nodeA", 1), ("nodeB", 0)])


def _link_table(file: Path) -> object:
    return fit_link(read_links(file))


def _cluster(file: Path) -> object:
    from ds_llmpq.serving.config import PlanConfig

    settings = PlanConfig(cluster_file=str(file))
    return Cluster.from_config(config.choose_cluster(settings))


def _overrides(rng: random.Random, seed: bytes) -> bytes:
    return json.dumps(mutated_overrides(rng, _OVERRIDES)).encode()


def _compose(file: Path) -> object:
    command = "run"
    return config.to_object(config.compose_settings(command, json.loads(file.read_bytes())), config.COMMANDS[command])


def _shape_of(checkpoint: Path) -> Callable[[Path], object]:
    def load(file: Path) -> object:
        _copied(checkpoint, file)
        fingerprint(file.parent)
        return read_shape(file.parent)

    return load


def read_checkpoint(checkpoint: Path, name: str, quantized: bool = False) -> Callable[[Path], object]:
    """Opens it as a rank does, and reads every tensor that it names."""

    def load(file: Path) -> object:
        from ds_llmpq.quant.quantized_checkpoint import open_checkpoint

        _copied(checkpoint, file)
        if quantized:
            (file.parent / "model.safetensors.index.json").write_bytes(_index(checkpoint))
            sha256 = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
            parts = {"embedding": {"file": "model.safetensors", "sha256": sha256, "made_from": {"source": "0" * 64}}}
            (file.parent / "quantized.json").write_text(json.dumps({"parts": parts}))
        opened = open_checkpoint(file.parent)
        if name == "config.json":
            return opened.config
        return [tensor.shape for _, tensor in opened.tensors(list(opened._shard_of))]

    return load


def _tokenizer(file: Path) -> object:
    from ds_llmpq.models.tokenizer import load_tokenizer

    _copied(TINY, file, ("config.json", "tokenizer_config.json", "chat_template.jinja"))
    return load_tokenizer(str(file.parent))


def _generation_of(checkpoint: Path) -> Callable[[Path], object]:
    def load(file: Path) -> object:
        _copied(checkpoint, file)
        return load_generation(file.parent).lines()

    return load


def _results(file: Path) -> object:
    read_finished(file.parent)
    with ResultWriter(file.parent, resume=True) as writer:
        return writer.counts


def _job(file: Path) -> object:
    return Job.from_token(file.read_bytes().decode(errors="replace"))


def _predictor_of(folder: Path) -> Callable[[Path], object]:
    def load(file: Path) -> object:
        _copied(folder, file)
        return load_predictor(file.parent)

    return load


def _copied(source: Path, file: Path, names: tuple[str, ...] | None = None) -> None:
    """The files of a folder beside the damaged one, which stays."""
    for each in source.iterdir():
        if each.is_file() and each.name != file.name and (names is None or each.name in names):
            shutil.copyfile(each, file.parent / each.name)


# --- valid files ---


def _planned(folder: Path) -> tuple[dict, dict]:
    from ds_llmpq.serving.planning import make_plan

    folder.mkdir(exist_ok=True)
    composed = config.compose_settings("plan", ["cluster=local_cpu2", "workload.sequences=4"])
    settings = config.to_object(composed, config.COMMANDS["plan"])
    make_plan(settings, folder)
    return tuple(json.loads((folder / name).read_text()) for name in ("plan.json", "problem.json"))


def _small_checkpoint(folder: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    shutil.copyfile(TINY / "config.json", folder / "config.json")
    tensors = {name: torch.zeros(2, 3) for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
    save_file(tensors, folder / "model.safetensors")
    return folder


def _index(checkpoint: Path) -> bytes:
    names = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    return json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}).encode()


def _quantized(checkpoint: Path) -> bytes:
    fields = json.loads((checkpoint / "config.json").read_text())
    fields["quantization_config"] = {
        "quant_method": "ds_llmpq_hqq", "format": 1, "bits": [4] * fields["num_hidden_layers"], "group_size": 64,
        "axis": 1, "per_channel_bits": [8], "optimize": False, "scale_dtype": "float32", "source_fingerprint": "0" * 64,
    }  # fmt: skip
    return json.dumps(fields).encode()


def _manifest(checkpoint: Path) -> bytes:
    sha256 = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    part = {"file": "model.safetensors", "bytes": 9, "sha256": sha256, "made_from": {"source": "0" * 64, "bits": 4}}
    return json.dumps({"format": 1, "parts": {"embedding": part | {"tensors": ["lm_head.weight"]}}}).encode()


def _latency(file: Path) -> bytes:
    setup = read_profile(file.parent / "profile.csv").setup
    ranges = {"batch_range": (1, 4), "length_range": (16, 128)}
    residual = Residual("prefill", 4, 2, 16, 0.01, 0.011, 0.1)
    fit = Fit("cpu_core", "layer", "prefill", 4, (0.1, 0.2), residuals=(residual,), **ranges)
    LatencyModel(setup, {fit.key: fit}).write(file)
    return file.read_bytes()


def _metrics(plan: dict) -> bytes:
    from ds_llmpq.serving.metrics import summarize

    found = summarize(Plan.from_json(plan), {}, [], [], startup_seconds=0.0)
    return json.dumps(found | {"counts": {"total": 3, "completed": 2, "failed": 1}}).encode()


def _dataset(folder: Path) -> bytes:
    from ds_llmpq.lengths.config import LengthDataConfig
    from ds_llmpq.lengths.records import Example

    options = LengthDataConfig()
    examples = [Example(f"word {n}", n + 1, "m", 2, str(n)) for n in range(12)]
    dataset.write(folder, dataset.split(examples, options), options)
    return (folder / "records.jsonl").read_bytes()


def _every_header(data: bytes) -> Iterator[bytes]:
    size = int.from_bytes(data[:8], "little")
    for header in exhaustive_json(data[8 : 8 + size]):
        yield len(header).to_bytes(8, "little") + header + data[8 + size :]
    for length in (0, 1, size + 1, size - 1, 2**31, 2**63, 2**64 - 1):
        yield length.to_bytes(8, "little") + data[8:]


def _mutated_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file: its header's length, its JSON header, or its bytes."""
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    kind = rng.randrange(3)
    if kind == 0:
        header = mutated_document(rng, header)
        return len(header).to_bytes(8, "little") + header + body
    if kind == 1:
        length = rng.choice([0, 1, size + 1, size - 1, 2**31, 2**63, 2**64 - 1])
        return length.to_bytes(8, "little") + header + body
    return mutated_bytes(rng, data)


def _small_tokenizer() -> bytes:
    """Single characters only: the real one's thousands of entries add time and no kinds of places."""
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    model = tokenizer["model"]
    model["merges"] = []
    model["vocab"] = {
        token: number for token, number in model["vocab"].items() if len(token) == 1 or token.startswith("<|")
    }
    return json.dumps(tokenizer).encode()


def _score_token(plan: Path) -> bytes:
    task = ScoringTask(EvaluationConfig(), "r")
    return Job(read_plan(plan), "m", None, "o", EngineConfig(), scoring=task).to_token().encode()


def _every_token(data: bytes) -> Iterator[bytes]:
    for fields in exhaustive_json(zlib.decompress(base64.urlsafe_b64decode(data))):
        yield base64.urlsafe_b64encode(zlib.compress(fields, 1))


def _token(plan: Path) -> bytes:
    return Job(read_plan(plan), "m", "i", "o", EngineConfig(), BatchConfig()).to_token().encode()


def _mutated_token(rng: random.Random, data: bytes) -> bytes:
    """The token's text, or the fields that are packed in it."""
    if rng.random() < 0.3:
        return mutated_bytes(rng, data)
    fields = mutated_document(rng, zlib.decompress(base64.urlsafe_b64decode(data)))
    return base64.urlsafe_b64encode(zlib.compress(fields))


def _profile(file: Path) -> bytes:
    from ds_llmpq.cost.profile import LIBRARIES, Point, Sample, Setup, append, write_header

    write_header(file, Setup("layer", "float32", "dequantize", 64, 1, dict.fromkeys(LIBRARIES, "1.0")), {"cores": 2})
    points = [Point("cpu_core", "layer", "prefill", 4, 2, length) for length in (16, 64, 128)]
    append(file, [Sample(point, 0, 5, 5, 0.01, 0.009, 0.1) for point in points])
    return file.read_bytes()


def _links() -> bytes:
    rows = "".join(f"a:0,a:1,activation,{size},5,{1e-4 + size * 1e-9},{1e-4}\n" for size in (8, 65536, 1048576))
    return f"source,target,channel,size_bytes,repeats,median_seconds,minimum_seconds\n{rows}".encode()


def _journal() -> bytes:
    fields = {
        "schema": 1,
        "identity": {"input": "a" * 64, "model": "b" * 64, "plan": "c" * 64, "sampling": {"seed": 0}, "settings": {}},
        "state": "unfinished",
        "counts": {},
        "attempts": [{"started": "2026-01-01T00:00:00+00:00", "ended": "", "reason": "", "results": 3}],
    }
    return json.dumps(fields).encode()


def _predictor(folder: Path) -> bytes:
    from ds_llmpq.lengths.config import LengthDataConfig, LengthTaskConfig, ProxyConfig
    from ds_llmpq.lengths.predictor import train
    from ds_llmpq.lengths.records import Example
    from scripts.make_length_data import make_answers

    found = make_answers(200, 0)
    examples = [Example(a.text, a.output_tokens, a.model, len(a.text.split()), str(n)) for n, a in enumerate(found)]
    options = LengthDataConfig()
    train(dataset.split(examples, options), LengthTaskConfig(), ProxyConfig(features=64), options).save(folder)
    return (folder / "predictor.json").read_bytes()
