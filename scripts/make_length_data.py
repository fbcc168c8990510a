"""Writes made-up prompts with answer lengths that depend on them: `make_length_data.py FILE [--count N] [--seed S]`.

Prints the noise ceiling: the mean absolute error, in tokens, that no predictor can beat by more than chance.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ds_llmpq.lengths.synthetic import make_answers, make_rows, measure_noise_ceiling


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sigma", type=float, default=0.35, help="noise on the logarithm of the length")
    parser.add_argument("--layout", choices=("rows", "lmsys"), default="rows")
    options = parser.parse_args(arguments)
    found = make_answers(options.count, options.seed, options.sigma)
    with open(options.file, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in make_rows(found, options.layout))
    print(f"{len(found)} answers; noise ceiling {measure_noise_ceiling(found):.1f} tokens")


if __name__ == "__main__":
    main()
