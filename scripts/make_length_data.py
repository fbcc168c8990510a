"""Writes made-up prompts with answer lengths that depend on them: `make_length_data.py FILE [--count N] [--seed S]`.

log(length) = task + style + topic + model + number + sigma * noise. All but the noise is known before the answer, so
the best prediction (of the median) is exp of the rest. Its mean absolute error, which is printed, is the noise ceiling:
no predictor beats it by more than chance.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TASKS = {
    "Answer with yes or no: is {topic} a good idea?": 1.2,
    "Translate the word for {topic} into French.": 2.0,
    "Give a one line definition of {topic}.": 3.2,
    "What is {topic}?": 4.2,
    "Summarize what is known about {topic}.": 4.6,
    "Explain {topic} to a student.": 5.1,
    "Compare {topic} with its alternatives.": 5.4,
    "Write an essay about {topic}.": 6.2,
    "Write a Python program that simulates {topic}.": 5.8,
    "List {number} facts about {topic}.": 3.0,
}
STYLES = {"": 0.0, "Be brief.": -0.7, "Go into detail.": 0.6, "Use simple words.": 0.1, "Think step by step.": 0.5}
MODELS = {"terse-7b": -0.35, "plain-13b": 0.0, "chatty-13b": 0.3}
FILLERS = ("I have wondered about this for a while.", "My teacher asked me.", "Thank you!", "This is for work.", "")
_TOPIC_WORDS = """rain rivers bread cheese chess trains bridges volcanoes tides bees whales maps clocks paper glass silk
steel opera jazz taxes inflation vaccines sleep memory dreams magnets lasers planets comets glaciers deserts forests
gardens castles markets harbours elections juries contracts sorting recursion hashing compilers caches queues"""
_TOPICS = tuple(_TOPIC_WORDS.split())


@dataclass(frozen=True)
class SyntheticAnswer:
    """`median_tokens`: what the best predictor would say."""

    text: str
    model: str
    output_tokens: int
    median_tokens: float


def make_answers(count: int, seed: int = 0, sigma: float = 0.35, max_tokens: int = 2048) -> list[SyntheticAnswer]:
    """`count` prompts with lengths; the same for the same arguments."""
    generator = np.random.default_rng(seed)
    # a topic's effect is fixed by its place in the list: the same in every data set
    effects = np.random.default_rng(1234).normal(0, 0.25, len(_TOPICS))
    found = []
    for _ in range(count):
        task, style, model = (str(generator.choice(list(names))) for names in (TASKS, STYLES, MODELS))
        topic, number = int(generator.integers(len(_TOPICS))), int(generator.integers(2, 21))
        log = TASKS[task] + STYLES[style] + MODELS[model] + effects[topic]
        if "{number}" in task:
            log += 0.9 * np.log(number)
        words = [FILLERS[generator.integers(len(FILLERS))], task.format(topic=_TOPICS[topic], number=number), style]
        length = np.exp(log + sigma * generator.normal())
        median = float(np.clip(np.exp(log), 1, max_tokens))
        text = " ".join(word for word in words if word)
        found.append(SyntheticAnswer(text, model, int(np.clip(round(length), 1, max_tokens)), median))
    return found


def measure_noise_ceiling(found: list[SyntheticAnswer]) -> float:
    """Mean absolute error of the best predictor, in tokens."""
    return float(np.mean([abs(answer.output_tokens - answer.median_tokens) for answer in found]))


def make_rows(found: list[SyntheticAnswer], layout: str = "rows") -> Iterator[dict[str, Any]]:
    """As a file would hold them. `lmsys`: LMSYS-Chat-1M's columns, the answer being that many words."""
    for number, answer in enumerate(found):
        if layout == "rows":
            yield {"prompt": answer.text, "model": answer.model, "output_tokens": answer.output_tokens}
            continue
        reply = " ".join(["word"] * answer.output_tokens)
        turns = [{"role": "user", "content": answer.text}, {"role": "assistant", "content": reply}]
        yield {
            "conversation_id": f"c{number}",
            "model": answer.model,
            "conversation": turns,
            "turn": 1,
            "language": "English",
        }


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
