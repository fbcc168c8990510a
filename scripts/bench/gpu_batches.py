"""Sections of `gpu.py` from end to end: a random model on disk, and batches of requests through the engine."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_run import Run, free
from gpu_speed import PREDICTED, make_cluster, resolve_quant
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cost.arithmetic import kv_bytes
from ds_llmpq.models.fingerprint import fingerprint
from ds_llmpq.models.shape import read_shape
from ds_llmpq.plan import Assignment, Plan, PlannedModel, StageAssignment
from ds_llmpq.planner import check_plan
from ds_llmpq.planner.build import prepare
from ds_llmpq.planner.config import MicroBatchesConfig, PlannerConfig, WorkloadConfig
from ds_llmpq.planner.deploy import deploy
from ds_llmpq.quant.kernels.registry import find_kernel

GIB = 1 << 30
SHAPE_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
SHAPE_TINY = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512,
}  # fmt: skip
SMALL_GPU_LAYERS = 8  # of the 8B shape, on cards that do not hold it
# (median tokens of a prompt, of an answer, spread of their logarithms, most of each): the first as in ShareGPT's
MIXES = {"ShareGPT-like": (120, 180, 1.0, 1024, 512), "long prompts": (900, 48, 0.3, 1536, 128)}
MIXES_TINY = {"ShareGPT-like": (6, 6, 0.5, 16, 16), "long prompts": (24, 3, 0.3, 32, 8)}


def write_model(run: Run, folder: Path) -> Path:
    """A random Llama of the 8B shape, made on the device and written a layer a file."""
    fields = dict(SHAPE_TINY if run.tiny else SHAPE_8B)
    if run.on_gpu and not run.tiny and torch.cuda.mem_get_info()[1] < 40 * GIB:
        fields["num_hidden_layers"] = SMALL_GPU_LAYERS
    config = LlamaConfig(**fields, tie_word_embeddings=False, dtype="bfloat16", eos_token_id=None)
    hidden, intermediate, size = config.hidden_size, config.intermediate_size, config.head_dim
    kv = config.num_key_value_heads * size
    layer = {
        "self_attn.q_proj": (config.num_attention_heads * size, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, config.num_attention_heads * size),
        "mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    files = {
        f"layer{index}": {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        for index in range(config.num_hidden_layers)
    }
    table = (config.vocab_size, hidden)
    files["ends"] = {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (hidden,)}
    torch.manual_seed(0)
    began, index = time.monotonic(), {}
    for file, shapes in files.items():
        tensors = {}
        for name, shape in shapes.items():
            made = torch.ones(shape, dtype=run.dtype, device=run.device)
            tensors[name] = (made.normal_().mul_(shape[-1] ** -0.5) if len(shape) > 1 else made).cpu()
            index[name] = f"{file}.safetensors"
        save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.save_pretrained(folder)
    shape = read_shape(folder)
    run.add("random Llama", layers=shape.layers, parameters=shape.parameters, seconds=time.monotonic() - began)
    return folder


def plan_for(
    run: Run, folder: Path, sequences: int, prompt: int, generated: int, dtype: str = "bfloat16", pool: int = 0
) -> Plan:
    """All layers at 16 bits on the one device, memory and times as the planner counts them. `pool`: cache positions
    that sequences share; 0: each has its own."""
    shape, config = read_shape(folder), make_cluster(run)
    cluster = Cluster.from_config(config)
    quant = dataclasses.replace(resolve_quant(run, shape, dtype), bits=[16])
    sizes = MicroBatchesConfig([max(1, min(sequences, 8192 // prompt))], [sequences])
    prepared = prepare(
        cluster, shape, WorkloadConfig(sequences, prompt, generated, pool_positions=pool), quant,
        PlannerConfig(micro_batches=sizes), None, dtype, find_kernel(quant.kernel), captured=run.on_gpu,
    )  # fmt: skip
    stage = StageAssignment(cluster.devices[0].name, 0, shape.layers, (16,) * shape.layers)
    solved = check_plan(prepared.problem, Assignment((stage,), sizes.prefill[0], sizes.decode[0]))
    model = PlannedModel(str(folder), shape.architecture, fingerprint(folder))
    return deploy(solved, cluster, prepared, model, quant, find_kernel(quant.kernel))


def requests(mix: tuple, count: int, vocabulary: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """(prompt, tokens of its answer) of each request, lengths log-normal."""
    prompt, answer, spread, most_prompt, most_answer = mix
    dice = random.Random(0)
    for _ in range(count):
        lengths = (
            max(1, min(most, round(median * dice.lognormvariate(0, spread))))
            for median, most in ((prompt, most_prompt), (answer, most_answer))
        )
        size, tokens = lengths
        yield tuple(dice.randrange(3, vocabulary) for _ in range(size)), tokens


class LengthRule:
    """Ends rows by their number of tokens, and all of them when the time is over."""

    def __init__(self, ends: float):
        self.ends = ends
        self.cut = False
        self._most: dict[int, int] = {}

    def begin(self, slot: int, row: object) -> None:
        self._most[slot] = row.max_tokens

    def __call__(self, slot: int, token: int, generated: int) -> object:
        from ds_llmpq.scheduler.slot_table import Finish

        self.cut |= time.monotonic() > self.ends
        return Finish.LENGTH if self.cut or generated >= self._most[slot] else Finish.RUNNING


def run_batches(run: Run, folder: Path) -> None:
    """The engine from end to end, in this process: requests of two mixes of lengths, against the plan's times and
    memory."""
    mixes = MIXES_TINY if run.tiny else MIXES
    shape = read_shape(folder)
    sequences = 4 if run.tiny else 256
    room = torch.cuda.mem_get_info()[0] if run.on_gpu else GIB
    a_token = shape.layers * kv_bytes(shape, 1, 1, run.dtype.itemsize)
    weights = shape.parameters * run.dtype.itemsize
    longest = max(mix[3] + mix[4] for mix in mixes.values())
    while sequences > 1 and weights + sequences * longest * a_token > 0.7 * room:
        sequences //= 2
    for name, mix in mixes.items():
        plan = plan_for(run, folder, sequences, mix[3], mix[4])
        # bars are for the first
        run_batch(run, plan, folder, name, mix, run.left() * (1 if name == list(mixes)[-1] else 0.75))
        gc.collect()  # an engine is part of cycles, and holds the model and the cache
        free(run.device)


def join(run: Run, plan: Plan) -> object:
    """The one rank's context, for this plan."""
    from ds_llmpq.engine.rank_context import init_rank
    from ds_llmpq.launch.launcher import find_free_port

    if run.context is None:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port()), "GLOO_SOCKET_IFNAME": "lo"}
        run.context = init_rank(plan, 600.0)
    return dataclasses.replace(run.context, stage=plan.stages[0])


def check_engine(run: Run) -> None:
    """A tiny Llama in float32 through the engine, one decode pass ahead of the host: greedy tokens are those of
    transformers, seeded ones those of a run that waits for each token."""
    from tiny_models import VOCABULARY, transformers_model

    from ds_llmpq.scheduler.request_group import Sequence
    from ds_llmpq.scheduler.sampling_params import SamplingParams

    theirs, dice = transformers_model("llama"), random.Random(3)
    prompts = [tuple(dice.randrange(3, VOCABULARY) for _ in range(dice.randint(1, 16))) for _ in range(12)]
    limits = [dice.randint(2, 12) for _ in prompts]
    seeded = [SamplingParams(temperature=0.9, top_p=0.95, seed=key) for key in range(len(prompts))]
    rows = [Sequence(key, *each) for key, each in enumerate(zip(prompts, limits, strict=True))]
    rows += [Sequence(len(rows) + key, *each) for key, each in enumerate(zip(prompts, limits, seeded, strict=True))]
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ahead, early = _generate(run, Path(folder), rows, wait=False)
        waited, late = _generate(run, Path(folder), rows, wait=True)
        compiled, _ = _generate(run, Path(folder), rows, wait=False, compile_blocks=None)
    if time.monotonic() > run.ends:  # answers were cut
        run.add("engine: time is up", "none")
        return
    theirs = theirs.to(run.device)
    wanted = []
    for prompt, limit in zip(prompts, limits, strict=True):
        settings = GenerationConfig(max_new_tokens=limit, do_sample=False, pad_token_id=0, eos_token_id=None)
        ids = torch.tensor([prompt], device=run.device)
        with torch.no_grad():
            made = theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        wanted.append(made[0, len(prompt) :].tolist())
    run.check("greedy tokens are those of generate", [ahead[key] for key in range(len(wanted))] == wanted)
    same = [compiled[key] for key in range(len(wanted))] == wanted
    run.check("greedy tokens are the same with compiled blocks", same, compiled=run.on_gpu)
    run.check("the same tokens where the host waits", ahead == waited and late == 0 < early, passes_ahead=early)


def _generate(
    run: Run, folder: Path, rows: list, wait: bool, compile_blocks: bool | None = False
) -> tuple[dict[int, list[int]], int]:
    """Tokens by key, and how many decode passes were launched ahead."""
    from ds_llmpq.engine.config import EngineConfig
    from ds_llmpq.engine.session import Session
    from ds_llmpq.scheduler.request_group import RequestGroup

    plan, found = plan_for(run, folder, 4, 16, 12, "float32"), {}
    options = EngineConfig(decode_graphs=True, compile_blocks=compile_blocks)
    session = Session(plan, join(run, plan), folder, LengthRule(run.ends), options=options)
    if wait:
        session.engine.ahead = None
    groups = iter([RequestGroup(tuple(rows), 4, 28, joins=True)])
    session.run_all(lambda: next(groups, None), lambda row, tokens, _: found.update({row.key: list(tokens)}))
    return found, session.report()["passes_ahead"]


def run_batch(run: Run, plan: Plan, folder: Path, name: str, mix: tuple, seconds: float, count: int = 1000) -> None:
    """So many requests of the mix, or as many as end in time."""
    from ds_llmpq.engine.config import EngineConfig
    from ds_llmpq.engine.session import Session
    from ds_llmpq.scheduler.request_group import RequestGroup, Sequence
    from ds_llmpq.serving.prediction import simulate_streams

    before = _memory(run)
    began = time.monotonic()
    rule = LengthRule(began + seconds)
    session = Session(plan, join(run, plan), folder, rule, options=EngineConfig(decode_graphs=True))
    load = time.monotonic() - began
    rule.ends -= 0.1 * seconds  # what is running has to end, too
    slots, capacity = plan.workload.sequences, plan.workload.prompt_tokens + plan.workload.generated_tokens
    if plan.is_paged:
        capacity = plan.cache_positions
    rows = requests(mix, min(count, 8) if run.tiny else count, read_shape(folder).vocab)
    waiting = [Sequence(key, prompt, tokens) for key, (prompt, tokens) in enumerate(rows)]
    asked = len(waiting)

    def take() -> RequestGroup | None:
        if not waiting or rule.cut or time.monotonic() > rule.ends:
            return None
        group, waiting[:slots] = tuple(waiting[:slots]), []
        return RequestGroup(group, slots, capacity, joins=True)

    capture = _TimedCapture(session)
    began, done = time.monotonic(), []
    session.run_all(take, lambda row, tokens, finish: done.append(len(tokens)))
    measured = time.monotonic() - began
    serving, report = measured - capture.seconds, session.report()
    streams = session.engine.stream_times
    simulated = simulate_streams(
        plan, [(each.slots, each.lengths, each.lengths.shared, each.lengths.most) for each in streams], session.limits
    )
    predicted = sum(each.latency_seconds for each in simulated or ())
    # spans of device time, in which a capture counts, too, though the device waits for it
    busy = sum(report["seconds"].get(phase, 0.0) for phase in ("prefill", "decode", "sample")) - capture.seconds
    run.add(
        f"batch: {name}", PREDICTED, requests=len(done), of=asked, slots=slots,
        seconds=measured, output_tokens_s=sum(done) / measured,
        captured_tokens_s=sum(done) / serving,
        all_tokens_s=(sum(done) + sum(t.prompt_tokens for t in streams)) / measured,
        predicted_seconds=predicted, measured_over_predicted=serving / predicted if predicted else 0.0,
        capture_seconds=capture.seconds, device_busy_share=busy / serving,
        cut_by_time=rule.cut, load_seconds=load,
    )  # fmt: skip
    run.add(
        f"passes: {name}", **{phase: report["passes"].get(phase, 0) for phase in ("prefill", "decode")},
        graphs=report["decode_graphs"], passes_ahead=report["passes_ahead"],
        **{f"{phase}_seconds": report["seconds"].get(phase, 0.0) for phase in ("prefill", "decode", "sample")},
    )  # fmt: skip
    planned, memory = plan.stages[0].memory_bytes, report["memory_bytes"]
    peak, (device_bytes, _) = memory["peak_growth"], _memory(run)
    if run.on_gpu:
        # what graphs and libraries hold is no tensor's
        beside = [device - tensors for device, tensors in (before, _memory(run))]
        peak = memory["peak"] - before[1] + beside[1] - beside[0]
    run.add(
        f"memory: {name}", "measured; planned: computed", weights_gib=memory["weights"] / GIB,
        planned_weights_gib=(planned.weights + planned.embed + planned.head) / GIB, kv_gib=memory["kv"] / GIB,
        planned_kv_gib=planned.kv / GIB, peak_gib=peak / GIB, planned_gib=planned.total / GIB,
        peak_over_planned=peak / planned.total, device_gib=device_bytes / GIB,
    )  # fmt: skip


def run_two_stages(run: Run, folder: Path) -> None:
    """The model cut in two, a rank on each of two GPUs, which `load_memory.py` starts: nccl takes one rank a device."""
    if run.on_gpu and torch.cuda.device_count() < 2:
        run.add("two stages: left out, nccl takes one rank a device and there is one", "none")
        return
    free(run.device)
    script, cut = Path(__file__).parent / "load_memory.py", str(read_shape(folder).layers // 2)
    command = [sys.executable, str(script), str(folder), "--cut", cut, "--kind", run.device.type]
    limit = max(1.0, run.left())
    # this process is a rank of its own since "engine"; the ranks to come are not its
    mine = ("RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in mine}
    code, found, said = _run_for(command, env, limit)
    ranks = [json.loads(line) for line in found.replace("}{", "}\n{").splitlines() if line.strip()]
    sound = code == 0 and len(ranks) == 2
    reason = {} if sound else {"exit_code": code, "reason": said[-2000:]}
    run.check("two stages: both ranks ran to their ends", sound, **reason)
    for rank in ranks:
        figures = {name: rank[name] for name in ("load_seconds", "output_tokens_per_second")}
        run.add(f"two stages, rank {rank['rank']}", **figures, peak_gib=rank["peak_bytes"] / GIB)


def _run_for(command: list[str], env: dict[str, str], seconds: float) -> tuple[int, str, str]:
    """Exit code, output and errors; when the time is over it ends with all that it has started, which would keep the
    GPUs."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env, start_new_session=True) as process:
        try:
            found, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            found, said = process.communicate()
            said += f"ended after {seconds:.0f} s"
        return process.returncode, found, said


def _memory(run: Run) -> tuple[int, int]:
    """Bytes in use on the GPU, and those of tensors in this process."""
    if not run.on_gpu:
        return 0, 0
    free(run.device)
    available, total = torch.cuda.mem_get_info()
    return total - available, torch.cuda.memory_allocated()


class _TimedCapture:
    """Counts the time that capturing takes in a session."""

    def __init__(self, session: object):
        self.seconds = 0.0
        captured = session.engine.passes.captured
        if captured is not None:
            self._capture, captured.capture = captured.capture, self

    def __call__(self, function: object, buffers: object) -> object:
        began = time.monotonic()
        try:
            return self._capture(function, buffers)
        finally:
            self.seconds += time.monotonic() - began
