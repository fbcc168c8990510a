"""Every file in conf/ is run, at a size that takes seconds: a new one is covered by lying there."""

import importlib
import json
import re
import shutil

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from ds_llmpq import config
from ds_llmpq.research.config import PUBLISHED_MODELS

CONF = config.conf_folder()
pytestmark = pytest.mark.slow

QUICK_PLAN = ["planner.time_limit_seconds=0.2", "planner.solver=search"]
SMALL = ["workload.sequences=4", "workload.prompt_tokens=32", "workload.generated_tokens=8"]
QUICK_SIMULATE = ["jobs=30", "repeats=1"]
QUICK_SENSITIVITY = ["calibration.rows=1", "calibration.tokens=16", "calibration.hessian_rows=1"]
QUICK_PROFILE = ["profiling.seconds=1", "profiling.rounds=1", "profiling.links=false", "quant.kernel=dequantize"]
# group -> command that runs its entries, and what makes it quick
GROUPS = {
    "experiment": ("plan", QUICK_PLAN),
    "comparison": ("simulate", QUICK_SIMULATE),
    "cluster": ("plan", [*QUICK_PLAN, *SMALL]),
    "model": ("plan", [*QUICK_PLAN, "cluster=cluster7", *SMALL]),
    "workload": ("plan", [*QUICK_PLAN, "cluster=local_cpu1"]),
    "planner": ("plan", [*QUICK_PLAN, *SMALL]),
    "quant": ("plan", [*QUICK_PLAN, *SMALL]),
    "engine": ("plan", [*QUICK_PLAN, *SMALL]),
    "batch": ("plan", [*QUICK_PLAN, *SMALL]),
    "device": ("plan", [*QUICK_PLAN, *SMALL]),
    "arrivals": ("simulate", QUICK_SIMULATE),
    "prediction": ("simulate", QUICK_SIMULATE),
    "lengths": ("lengths", ["action=train"]),
    "task": ("lengths", ["action=train"]),
    "proxy": ("lengths", ["action=train"]),
}
OF_COMMAND = {"profile": [*QUICK_PROFILE, *SMALL], "sensitivity": QUICK_SENSITIVITY}
NEEDS_A_SCHEDULER_OR_A_SERVER = {"hydra"}  # launchers and callbacks of sweeps


def entries():
    return [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]


def test_every_folder_is_run_here():
    folders = {folder.name for folder in CONF.iterdir() if folder.is_dir() and any(folder.rglob("*.yaml"))}
    assert folders - NEEDS_A_SCHEDULER_OR_A_SERVER == set(GROUPS)


@pytest.mark.parametrize(("group", "entry"), entries())
def test_a_shipped_configuration_runs(group, entry, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (CONF / group / f"{entry}.yaml").read_text()
    command, quick = GROUPS[group]
    if named := re.search(r"^# CommandConfig: (\w+)$", text, re.MULTILINE):
        command, quick = named[1], OF_COMMAND[named[1]]
    chosen = {"experiment": f"+experiment={entry}", "device": ""}.get(group, f"{group}={entry}")
    if group == "cluster" and entry in PUBLISHED_MODELS:
        chosen, quick = f"+experiment=paper cluster={entry}", QUICK_PLAN
    if together := re.search(rf"\+experiment=\[\w+,{entry}\]", text):  # what it says it is to be combined with
        chosen = together[0]
    arguments = [*chosen.split(), *quick, *needs(group, entry, tmp_path)]
    swept = OmegaConf.select(OmegaConf.create(text), "hydra.sweeper.params") or {}
    for end in {0, -1} if swept else {0}:
        point = [f"{key}={values(key, listed)[end]}" for key, listed in swept.items()]
        write_sensitivities(point)
        run(command, [*arguments, *point], tmp_path / f"out{end}")


def run(command, arguments, out):
    out.mkdir()
    settings = config.to_object(config.compose_settings(command, [f"out={out}", *arguments]), config.COMMANDS[command])
    assert importlib.import_module(f"ds_llmpq.commands.{command}").run(settings, out) == 0
    written = [file for file in out.rglob("*") if file.is_file()]
    assert written
    for file in written:
        if file.suffix == ".json":
            json.loads(file.read_text())
    return out


def values(key, listed):
    override = OverridesParser.create().parse_override(f"{key}={listed}")
    assert override.is_sweep_override()
    return list(override.sweep_string_iterator())


def write_sensitivities(point):
    """Files of `sensitivity` that a point names by a relative path."""
    for key, _, name in (each.partition("=") for each in point):
        if key == "planner.sensitivity":
            folder = config.make_absolute(name).parent
            folder.parent.mkdir(parents=True, exist_ok=True)
            run("sensitivity", ["method=random", "calibration.rows=1", "calibration.tokens=16"], folder)


def needs(group, entry, folder):
    """Files of the user's that an entry asks for."""
    if (group, entry) == ("arrivals", "trace"):
        rows = "".join(f"2023-11-16 18:{n // 60:02}:{n % 60:02}.0000000,{20 + n},{5 + n}\n" for n in range(40))
        (folder / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
        return [f"arrivals.trace={folder / 'trace.csv'}"]
    if (group, entry) == ("prediction", "data"):
        rows = ({"output_tokens": 5 + n, "prompt_tokens": 9, "predicted_tokens": 6 + n} for n in range(40))
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ["answers.kind=data", f"answers.data={folder / 'data.jsonl'}"]
    if group == "device":
        cluster = folder / "cluster.yaml"
        cluster.write_text(
            f"defaults: [/device@device_types.{entry}: {entry}]\nname: one\n"
            f"hosts: [{{name: localhost, devices: [{{type: {entry}, memory_bytes: {8 << 30}}}]}}]\n"
        )
        return [f"cluster_file={cluster}"]
    if group in ("lengths", "task", "proxy"):
        return training_data(group, entry, folder)
    return []


def training_data(group, entry, folder):
    from scripts.make_length_data import make_answers

    made = make_answers(120, 0)
    if (group, entry) == ("lengths", "lmsys"):
        turns = [[{"role": "user", "content": a.text}, {"role": "assistant", "content": "a " * a.output_tokens}]
                 for a in made]  # fmt: skip
        rows = [{"conversation_id": str(n), "model": "m", "conversation": turn} for n, turn in enumerate(turns)]
        return [f"data={write_rows(folder / 'data.jsonl', rows)}"]
    if (group, entry) == ("lengths", "results"):
        asked = [request_row(n, answer) for n, answer in enumerate(made)]
        results = [format_result(n, answer) for n, answer in enumerate(made)]
        return [
            f"data={write_rows(folder / 'results.jsonl', results)}",
            f"lengths.input={write_rows(folder / 'batch.jsonl', asked)}",
        ]
    rows = [{"prompt": a.text, "output_tokens": a.output_tokens} for a in made]
    data = [f"data={write_rows(folder / 'data.jsonl', rows)}"]
    if (group, entry) == ("proxy", "encoder"):
        return [*data, f"proxy.path={small_bert(folder / 'bert', made)}", "proxy.epochs=2"]
    return data


def request_row(number, answer):
    body = {"model": "m", "messages": [{"role": "user", "content": answer.text}]}
    return {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}


def format_result(number, answer):
    message = {"role": "assistant", "content": "a"}
    body = {
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": answer.output_tokens},
    }
    return {"custom_id": str(number), "response": {"status_code": 200, "body": body}, "error": None}


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def small_bert(folder, made):
    torch = pytest.importorskip("torch")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir()
    words = sorted({word for answer in made for word in re.findall(r"\w+", answer.text.lower())})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words) + 5, **settings)).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_left_over_folders(tmp_path):
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)
