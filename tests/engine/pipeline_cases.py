"""Cases for the pipeline: model variants, plans cut by hand or at random, and what transformers generates for them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from ds_llmpq.models.fingerprint import fingerprint
from ds_llmpq.plan import (
    Deployment,
    MicroBatches,
    Plan,
    PlannedModel,
    PredictedTotals,
    Quantization,
    SolverReport,
    Stage,
    StageMemory,
    Workload,
)
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.scheduler.request_group import RequestGroup, Sequence
from ds_llmpq.scheduler.sampling_params import SamplingParams
from ds_llmpq.scheduler.slot_table import Finish

LAYERS = 5
VOCABULARY = 128
_SMALL = {"layers": LAYERS, "hidden": 64, "heads": 4, "vocab": VOCABULARY, "max_positions": 160, "dtype": "float32"}
_OLD_LAYERS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = {"sliding_window": 6, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 20.0}
VARIANTS = {
    "llama": _SMALL | {"arch": "llama", "kv_heads": 2},
    "llama-biased-tied": _SMALL
    | {"arch": "llama", "tied": True, "config": {"attention_bias": True, "mlp_bias": True}, "shard_size": "100KB"},
    "mistral": _SMALL | {"arch": "mistral", "kv_heads": 1},
    "mistral-window": _SMALL | {"arch": "mistral", "kv_heads": 2, "config": {"sliding_window": 6}},
    "qwen2": _SMALL | {"arch": "qwen2", "kv_heads": 2, "shard_size": "200KB"},
    "qwen2-window": _SMALL
    | {"arch": "qwen2", "tied": True}
    | {"config": {"use_sliding_window": True, "sliding_window": 7, "layer_types": _OLD_LAYERS}},
    "qwen3": _SMALL | {"arch": "qwen3", "kv_heads": 2, "head_dim": 32},
    "opt": _SMALL | {"arch": "opt"},
    "opt-projected-post-norm": _SMALL | {"arch": "opt", "word_embed_proj_dim": 32, "layer_norm_before": False},
    "opt-untied": _SMALL | {"arch": "opt", "tied": False, "dtype": "bfloat16"},
    "bloom": _SMALL | {"arch": "bloom"},
    "bloom-three-heads": _SMALL | {"arch": "bloom", "hidden": 96, "heads": 3, "tied": False},
    "phi3-window": _SMALL | {"arch": "phi3", "kv_heads": 2, "config": {"sliding_window": 6, "pad_token_id": 0}},
    "gemma2": _SMALL | {"arch": "gemma2", "kv_heads": 2, "head_dim": 32, "config": _GEMMA},
    "gemma3": _SMALL
    | {"arch": "gemma3_text", "kv_heads": 1, "head_dim": 32, "config": _GEMMA | {"layer_types": _OLD_LAYERS}},
    "mixtral": _SMALL | {"arch": "mixtral", "kv_heads": 2, "config": {"num_local_experts": 4}},
    "qwen3-moe": _SMALL
    | {"arch": "qwen3_moe", "kv_heads": 2, "head_dim": 32}
    | {"config": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "norm_topk_prob": True}},
}
GROUP_SIZE = 32
QUANT = {"bits": [16], "group_size": GROUP_SIZE, "axis": 1, "optimize": False}
# a pair of logits closer than this may be ordered otherwise by another order of summation
CLEAR_GAP = 1e-3
_WAVE = 1000  # more rows than any group has


def make_plan(
    path: Path,
    stages: list[tuple[int, int]],
    bits: list[int] | None = None,
    ranks: list[int] | None = None,
    micro_batch: tuple[int, int] = (3, 2),
    workload: tuple[int, int, int] = (8, 12, 12),
    dtype: str = "float32",
    quant: dict | None = None,
) -> Plan:
    """A plan by hand: `stages` are the layers [first, last) in pipeline order, `ranks` who runs them."""
    ranks = ranks or list(range(len(stages)))
    bits = bits or [16] * stages[-1][1]
    return Plan(
        model=PlannedModel(str(path), fingerprint=fingerprint(path)),
        workload=Workload(*workload),
        stages=tuple(
            Stage(rank, "localhost", f"localhost:{rank}", "cpu", layers, tuple(bits[slice(*layers)]), None,
                  StageMemory(0.0, 0.0, 0.0, 0.0, 0.0),
                  0.0, 0.0, 0.0, kind="cpu", slot=rank, threads=1)
            for rank, layers in zip(ranks, stages, strict=True)
        ),
        micro_batch=MicroBatches(*micro_batch),
        predicted=PredictedTotals(0.0, 0.0, 0.0, 0.0, 0.0),
        solver=SolverReport("hand", 0.0, None, None, 0.0, "checked"),
        quant=Quantization.from_config(QuantConfig(**(quant or QUANT))),
        deployment=Deployment(dtype),
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What the ranks shall run. `prefix`: what sequences may share. `every`: the stop rule also ends each row at that
    many tokens. `options`: the engine's. `room`: by stage, the most tokens that a pass has memory for. `poison`: what
    raises where, as `rank_host` takes it. Rows are known by their group and their place in it."""

    path: Path
    plan: Plan
    groups: tuple[RequestGroup, ...]
    eos: tuple[int, ...] = ()
    every: int | None = None
    logits: bool = False
    dies: int | None = None
    label: str = ""
    options: dict = field(default_factory=dict)
    room: dict[int, int] = field(default_factory=dict)
    poison: tuple[dict, ...] = ()
    prefix: tuple[int, ...] = ()

    def to_json(self) -> dict:
        plain = {"path": str(self.path), "plan": self.plan.to_json(), "eos": self.eos, "every": self.every}
        groups = []
        for index, group in enumerate(self.groups):
            rows = [dataclasses.replace(row, key=index * _WAVE + place) for place, row in enumerate(group.sequences)]
            groups.append(dataclasses.replace(group, sequences=tuple(rows)).to_bytes().hex())
        return plain | {
            "groups": groups,
            "logits": self.logits,
            "dies": self.dies,
            "options": self.options,
            "room": self.room,
            "poison": self.poison,
            "prefix": self.prefix,
        }


@dataclass
class Outcome:
    """What the ranks said of one case, in rank order; all agree on the rows."""

    ranks: list[dict]

    def __post_init__(self) -> None:
        for other in self.ranks[1:]:
            for said in ("outcomes", "lengths"):
                assert other[said] == self.ranks[0][said], f"ranks disagree on {said}"
        keys = [key for key, _, _ in self.ranks[0]["outcomes"]]
        assert len(set(keys)) == len(keys), "a row ended twice"

    def tokens(self, group: int = 0) -> list[list[int]]:
        """Of the group's rows, in their order."""
        return [tokens for _, tokens, _ in sorted(self._of(group))]

    def finish(self, group: int = 0) -> list[Finish]:
        return [Finish(code) for _, _, code in sorted(self._of(group))]

    def faults(self) -> dict[int, dict]:
        """Why rows were given up, by their place in the first group, as the driver was told."""
        driver = next(rank for rank in self.ranks if rank["faults"] is not None)
        return dict(driver["faults"])

    def order(self, group: int = 0) -> list[int]:
        """Places in the group in the order in which rows ended."""
        return [key % _WAVE for key, _, _ in self._of(group)]

    def _of(self, group: int) -> list:
        return [outcome for outcome in self.ranks[0]["outcomes"] if outcome[0] // _WAVE == group]

    def stage(self, index: int) -> dict:
        return next(rank for rank in self.ranks if rank["stage"] == index)


class Ranks:
    """Runs cases on forked ranks; the process that forks them starts with the first case."""

    def __init__(self) -> None:
        self._host: subprocess.Popen | None = None

    def run(self, *cases: Case, timeout: float = 240.0) -> list[Outcome]:
        """Cases with the same number of stages, one after the other in the same processes."""
        reply = self.reply(*cases, timeout=timeout)
        labels = ", ".join(case.label for case in cases if case.label)
        assert reply["problem"] is None, f"{labels}: {reply['problem']}"
        return [Outcome(list(of_ranks)) for of_ranks in zip(*reply["ranks"], strict=True)]

    def reply(self, *cases: Case, timeout: float = 240.0, expect_death: bool = False) -> dict:
        request = {"cases": [case.to_json() for case in cases], "timeout": timeout, "expect_death": expect_death}
        host = self._started()
        host.stdin.write(json.dumps(request) + "\n")
        host.stdin.flush()
        return json.loads(host.stdout.readline())

    def close(self) -> None:
        if self._host is not None:
            self._host.stdin.close()
            self._host.wait(30)

    def _started(self) -> subprocess.Popen:
        if self._host is None:
            script = Path(__file__).with_name("rank_host.py")
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._host = subprocess.Popen([sys.executable, str(script)], **pipes)
            while not self._host.stdout.readline().startswith('{"ready"'):
                assert self._host.poll() is None, "the process that forks ranks did not start"
        return self._host


class Reference:
    """A checkpoint in transformers, in one process; `bits` puts HQQ's own layers in the place of its linears, and
    `lm_head_bits` in that of its lm_head."""

    def __init__(self, path: Path, bits: tuple[int, ...] = (), dtype: str = "float32", lm_head_bits: int = 16):
        # Gemma 2 caps scores: there transformers 5.17 chooses SDPA and leaves the cap out
        capped = AutoConfig.from_pretrained(path).model_type == "gemma2"
        own = {"attn_implementation": "eager"} if capped else {}
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), **own).eval()
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        for layer, width in zip(decoder_layers(self.model), bits, strict=False):
            if width < 16:
                quantize_with_hqq(layer, width, getattr(torch, dtype))
        if lm_head_bits < 16:
            alone = nn.ModuleDict({"lm_head": self.model.lm_head})
            quantize_with_hqq(alone, lm_head_bits, getattr(torch, dtype))
            self.model.lm_head = alone["lm_head"]

    @torch.no_grad()
    def generate(self, prompts: list[tuple[int, ...]], max_tokens: int, eos: tuple[int, ...] = ()) -> list[list[int]]:
        """Greedy tokens of each prompt, up to and with the first of `eos`; several prompts as a left-padded batch."""
        longest = max(map(len, prompts))
        ids = torch.tensor([(0,) * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        self.model.generation_config.eos_token_id = list(eos) or None
        out = self.model.generate(ids, attention_mask=mask, max_new_tokens=max_tokens)[:, longest:].tolist()
        return [_cut(tokens, max_tokens, eos) for tokens in out]

    @torch.no_grad()
    def logits(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """[tokens, vocabulary] in float32, of one unpadded pass."""
        return self.model(torch.tensor([tokens])).logits[0].float()

    def has_clear_gaps(self, prompt: tuple[int, ...], tokens: list[int]) -> bool:
        top = self.logits(prompt + tuple(tokens)).topk(2).values[len(prompt) - 1 : -1]
        return bool(((top[:, 0] - top[:, 1]) > CLEAR_GAP).all())


@cache
def reference(path: Path, bits: tuple[int, ...] = (), dtype: str = "float32", lm_head_bits: int = 16) -> Reference:
    return Reference(path, bits, dtype, lm_head_bits)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The longest module list of a model is that of its decoder layers."""
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)


def quantize_with_hqq(layer: nn.Module, bits: int, dtype: torch.dtype) -> None:
    """HQQ's own constructor, not the package's."""
    config = BaseQuantizeConfig(nbits=bits, group_size=GROUP_SIZE, axis=1)
    config["weight_quant_params"] |= {"optimize": False, "round_zero": False}
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, HQQLinear(child, config, compute_dtype=dtype, device="cpu"))
        if isinstance(getattr(parent, "gate_up_proj", None), nn.Parameter):  # experts, [experts, out, in] each
            for expert in range(len(parent.gate_up_proj)):
                for weight in (*parent.gate_up_proj.data[expert].chunk(2), parent.down_proj.data[expert]):
                    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                    linear.weight.data = weight.clone()
                    weight.copy_(HQQLinear(linear, config, compute_dtype=dtype, device="cpu").dequantize())


def _cut(tokens: list[int], max_tokens: int, eos: tuple[int, ...]) -> list[int]:
    """A batch goes on until its last row ends: the padding behind a row's own end is dropped."""
    ends = [index + 1 for index, token in enumerate(tokens) if token in eos]
    return tokens[: min([max_tokens, *ends])]


@dataclass
class Draw:
    """Random cases from one seed."""

    seed: int
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def cuts(self, stages: int) -> list[tuple[int, int]]:
        inner = sorted(self.random.sample(range(1, LAYERS), stages - 1))
        bounds = [0, *inner, LAYERS]
        return list(itertools.pairwise(bounds))

    def bits(self) -> tuple[int, ...]:
        """Every width once, in any order."""
        return tuple(self.random.sample((2, 3, 4, 8, 16), LAYERS))

    def permutation(self, stages: int) -> list[int]:
        return self.random.sample(range(stages), stages)

    def prompt(self, longest: int) -> tuple[int, ...]:
        return tuple(self.random.randrange(VOCABULARY) for _ in range(self.random.randint(1, longest)))

    def row(self, key: int, model: Reference, longest: int, most: int) -> Sequence:
        """A request whose greedy tokens do not hang on rounding."""
        for _ in range(50):
            prompt, max_tokens = self.prompt(longest), self.random.randint(1, most)
            if model.has_clear_gaps(prompt, model.generate([prompt], max_tokens)[0]):
                return Sequence(key, prompt, max_tokens)
        raise AssertionError(f"seed {self.seed}: no prompt with clear gaps")

    def case(
        self, path: Path, stages: int, bits: tuple[int, ...] = (), lm_head_bits: int = 16
    ) -> tuple[Case, list[list[int]]]:
        """A random case of up to 7 rows in one or two groups, and the tokens it must give, group after group."""
        model = reference(path, bits, lm_head_bits=lm_head_bits)
        rows = [self.row(key, model, longest=12, most=12) for key in range(self.random.randint(2, 7))]
        free = [model.generate([row.prompt], row.max_tokens)[0] for row in rows]
        eos: tuple[int, ...] = ()
        if self.random.random() < 0.6:
            eos = tuple(self.random.sample(sorted({token for tokens in free for token in tokens}), 1))
            rows = [
                dataclasses.replace(row, sampling=SamplingParams(ignore_eos=self.random.random() < 0.2)) for row in rows
            ]
        expected = self._expected(model, rows, eos)
        middle = self.random.choice([len(rows), self.random.randint(1, len(rows))])
        groups = tuple(RequestGroup(tuple(part)) for part in (rows[:middle], rows[middle:]) if part)
        plan = make_plan(
            path,
            self.cuts(stages),
            list(bits) or None,
            self.permutation(stages),
            micro_batch=(self.random.randint(1, 8), self.random.randint(1, 8)),
            workload=(8, self.random.choice((12, 20)), 12),
            quant=QUANT | {"lm_head_bits": lm_head_bits},
        )
        return Case(path, plan, groups, eos, label=f"seed {self.seed} {path.name} {plan.micro_batch}"), expected

    def _expected(self, model: Reference, rows: list[Sequence], eos: tuple[int, ...]) -> list[list[int]]:
        """One at a time or, by chance, as left-padded batches of the rows that heed the end-of-sequence token."""
        expected: dict[int, list[int]] = {}
        for heeding in (True, False):
            part = [row for row in rows if row.sampling.ignore_eos is not heeding]
            size = self.random.choice((1, len(part) or 1))
            for start in range(0, len(part), size):
                batch = part[start : start + size]
                most = max(row.max_tokens for row in batch)
                found = model.generate([row.prompt for row in batch], most, eos if heeding else ())
                for row, tokens in zip(batch, found, strict=True):
                    expected[row.key] = tokens[: row.max_tokens]
        return [expected[row.key] for row in rows]
