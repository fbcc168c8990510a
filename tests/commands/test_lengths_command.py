"""`ds-llmpq lengths`: from a file of answers to predictions, and from a run's results to the next predictor."""

import json
import subprocess
import sys

from ds_llmpq import config
from ds_llmpq.commands import lengths
from ds_llmpq.lengths.config import LengthsConfig
from scripts.make_length_data import make_answers, make_rows


def command(out, *overrides):
    out.mkdir(parents=True, exist_ok=True)
    settings = config.to_object(config.compose_settings("lengths", [f"out={out}", *map(str, overrides)]), LengthsConfig)
    return lengths.run(settings, out)


def write(path, objects):
    path.write_text("".join(json.dumps(each) + "\n" for each in objects))
    return path


def test_from_answers_to_predictions(tmp_path, capsys):
    data = write(tmp_path / "data.jsonl", make_rows(make_answers(400), "lmsys"))
    command(tmp_path / "prepared", "action=prepare", f"data={data}", "lengths=lmsys")
    command(tmp_path / "predictor", "action=train", f"data={tmp_path / 'prepared'}", "task=multiclass")
    command(tmp_path / "evaluated", "action=evaluate", f"predictor={tmp_path / 'predictor'}", f"data={data}")
    assert "test split: 80 examples" in capsys.readouterr().out
    trained, evaluated = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("predictor", "evaluated"))
    assert {"accuracy", "macro_f1", "kendall_tau", "q90_coverage", "mae_tokens"} <= trained.keys()
    assert trained["mae_tokens"] == evaluated["mae_tokens"]
    command(tmp_path / "predicted", "action=predict", f"predictor={tmp_path / 'predictor'}", f"input={data}")
    found = [json.loads(line) for line in (tmp_path / "predicted" / "predictions.jsonl").read_text().splitlines()]
    assert len(found) == 400
    assert {"custom_id", "predicted_tokens", "q90", "q95", "predicted_class", "output_tokens"} <= found[0].keys()


def test_the_results_of_a_run_train_the_predictor_of_the_next(tmp_path):
    found = make_answers(100)
    batch = write(
        tmp_path / "in.jsonl", [{"custom_id": f"r{n}", "body": {"prompt": a.text}} for n, a in enumerate(found)]
    )
    bodies = [{"model": "m", "choices": [{}], "usage": {"completion_tokens": a.output_tokens}} for a in found]
    results = write(
        tmp_path / "results.jsonl",
        [{"custom_id": f"r{n}", "response": {"body": body}, "error": None} for n, body in enumerate(bodies)],
    )
    command(tmp_path / "predictor", "action=train", f"data={results}", "lengths=results", f"lengths.input={batch}")
    command(tmp_path / "next", "action=predict", f"predictor={tmp_path / 'predictor'}", f"input={batch}")
    names = [json.loads(line)["custom_id"] for line in (tmp_path / "next" / "predictions.jsonl").open()]
    assert names == [f"r{n}" for n in range(100)]


def test_characterization_is_a_table_and_two_pictures(tmp_path, capsys):
    data = write(tmp_path / "data.jsonl", make_rows(make_answers(200)))
    command(tmp_path / "out", "action=characterize", f"data={data}")
    assert "tail ratio" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "lengths.json").read_text())
    assert set(found) == {"all", "terse-7b", "plain-13b", "chatty-13b"}
    assert found["all"]["answers"] == 200
    for name in ("lengths_box.png", "lengths_histogram.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_the_action_stands_first_on_the_command_line(tmp_path):
    command = [sys.executable, "-m", "ds_llmpq", "lengths"]
    for given, said in ((["train"], "data=FILE"), (["fly"], "action is 'fly'")):
        result = subprocess.run([*command, *given, f"out={tmp_path}"], capture_output=True, text=True, timeout=120)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert said in result.stderr
