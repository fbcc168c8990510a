"""How many answers are those of a quiet run after a rank was killed while rows were in flight.

    python scripts/restart_equality.py [KILLS] [SEED] [OVERRIDE ...]

Serves 120 greedy and 15 sampled rows on the shipped model, quietly once more than it needs (what differs between two
quiet runs is not a restart's doing) and KILLS times (default 10) with a kill -9 of a random rank at a random moment.
`run` restarts by itself. Prints a line a kill, and the sums.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests" / "faults")]

from harness import find_victim  # noqa: E402
from launching import Command, gone, write_rows  # noqa: E402

GREEDY, SAMPLED, TOKENS = 120, 15, 96


def batch(file: Path) -> Path:
    rng, words = random.Random(0), ["path", "open", "read", "join", "split", "file", "name", "return", "self", "import"]
    rows = []
    for index in range(GREEDY + SAMPLED):
        body = {
            "prompt": " ".join(rng.choices(words, k=rng.randint(3, 20))),
            "max_tokens": rng.randint(TOKENS // 3, TOKENS),
        }
        body |= {"temperature": 0 if index < GREEDY else 0.8, "ignore_eos": True}
        name = f"{'greedy' if index < GREEDY else 'sampled'}-{index}"
        rows.append({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body})
    rng.shuffle(rows)
    return write_rows(file, rows)


def served(rows: Path, out: Path, overrides: list[str], kill: random.Random | None = None) -> dict[str, str]:
    """custom_id -> the row as it stands in results.jsonl."""
    command = Command(("run", f"input={rows}", f"out={out}", "run.backoff_seconds=0.2", *overrides))
    process = command.start()
    try:
        if kill is not None:
            strike(process, command, out / "results.jsonl", kill)
        _, err = process.communicate(timeout=600)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, err
    assert gone(command.processes)
    return {json.loads(line)["custom_id"]: line for line in (out / "results.jsonl").read_text().splitlines()}


def strike(process, command: Command, results: Path, kill: random.Random) -> None:
    progress, rank = kill.randrange(5, GREEDY - 20), kill.choice(("rank 0", "rank 1"))
    while not results.exists() or results.read_bytes().count(b"\n") < progress:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    find_victim(rank, process, command).send_signal(signal.SIGKILL)


def differing(expected: dict[str, str], found: dict[str, str]) -> tuple[int, int]:
    """(greedy, sampled) rows that are not those of the quiet run."""
    assert expected.keys() == found.keys(), "rows are lost or doubled"
    other = [name for name in expected if expected[name] != found[name]]
    return sum(name.startswith("greedy") for name in other), sum(name.startswith("sampled") for name in other)


def main() -> None:
    kills, seed = (int(value) for value in (sys.argv[1:3] + ["10", "0"][len(sys.argv[1:3]) :]))
    overrides, sums = sys.argv[3:], [0, 0, 0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = batch(folder / "rows.jsonl")
        expected = served(rows, folder / "quiet", overrides)
        print("quiet again:", differing(expected, served(rows, folder / "again", overrides)), flush=True)
        for number in range(seed, seed + kills):
            out = folder / str(number)
            greedy, sampled = differing(expected, served(rows, out, overrides, random.Random(number)))
            metrics = json.loads((out / "metrics.json").read_text())
            went_on = metrics["gone_on_from"]
            sums = [total + value for total, value in zip(sums, (greedy, sampled, went_on["rows"]), strict=True)]
            print(
                f"kill {number}: {metrics['restarts']['restarts']} restarts, went on from {went_on['tokens']} tokens "
                f"of {went_on['rows']} rows; others: {greedy} of {GREEDY} greedy, {sampled} of {SAMPLED} sampled",
                flush=True,
            )
    print(f"in all: {sums[0]} of {kills * GREEDY} greedy and {sums[1]} of {kills * SAMPLED} sampled rows differ, "
          f"{sums[2]} went on from their tokens")  # fmt: skip


if __name__ == "__main__":
    main()
