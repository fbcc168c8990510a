"""A Hugging Face encoder that predicts lengths, with the head and the two-phase training of the SSJF paper.

[CLS] -> Linear(hidden, h) -> ReLU -> Linear(h [+ one-hot of models], h) -> ReLU -> Linear(outputs). AdamW trains all
layers for the first half of the epochs, then only the head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Le, MaxLen
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoTokenizer

from ds_llmpq.errors import UserError, first_line
from ds_llmpq.files import check_files
from ds_llmpq.lengths.config import ProxyConfig
from ds_llmpq.lengths.dataset import TRUNCATIONS, collect_lengths, fingerprint, truncate
from ds_llmpq.lengths.records import MOST_TOKENS, Example
from ds_llmpq.lengths.tasks import LengthTask
from ds_llmpq.lengths.training_state import TrainingState
from ds_llmpq.validation import Label, Many, one_of, validate


@dataclass(frozen=True)
class _EncoderFile:
    """The part of predictor.json that describes an encoder."""

    hidden_size: Annotated[int, Ge(1), Le(1 << 16)]
    width: Annotated[int, Ge(1), Le(1 << 14)]
    models: Annotated[Many[Label], MaxLen(10_000)]
    outputs: Annotated[int, Ge(1), Le(1_000)]
    truncation: one_of(*TRUNCATIONS)
    max_tokens: Annotated[int, Ge(1), Le(MOST_TOKENS)]


class RegressionHead(nn.Module):
    """[n, hidden], [n, models] -> [n, outputs]."""

    def __init__(self, hidden: int, models: int, width: int, outputs: int):
        super().__init__()
        self.first = nn.Linear(hidden, width)
        self.second = nn.Linear(width + models, width)
        self.last = nn.Linear(width, outputs)

    def forward(self, pooled: torch.Tensor, one_hot: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(pooled))
        return self.last(torch.relu(self.second(torch.cat([hidden, one_hot], dim=1))))


class EncoderModel:
    """Scores have the form of `NgramModel`'s; there are quantile columns only with loss=quantile."""

    kind = "encoder"

    def __init__(self, encoder: nn.Module, head: RegressionHead, tokenizer: Any, described: dict[str, Any]):
        self.encoder, self.head, self.tokenizer, self.described = encoder, head, tokenizer, described

    @classmethod
    def fit(
        cls, task: LengthTask, train: Sequence[Example], models: Sequence[str], limits: dict[str, Any],
        config: ProxyConfig, seed: int = 0, progress: Path | None = None,
    ) -> EncoderModel:  # fmt: skip
        """Fine-tunes the encoder of `config.path`. `limits`: truncation and max_tokens of prompts. `progress`: a folder
        that keeps each epoch until all are done, so that a killed training resumes."""
        if config.path is None:
            raise UserError("proxy.kind=encoder needs proxy.path=DIR, a local folder of a Hugging Face encoder.")
        if config.epochs < 1 or config.batch_size < 2 or config.hidden < 1 or not config.learning_rate > 0:
            raise UserError("proxy.epochs, hidden and learning_rate must be positive, and proxy.batch_size at least 2.")
        torch.manual_seed(seed)
        encoder, tokenizer = _load_pretrained(Path(config.path).expanduser())
        size, known = encoder.config.hidden_size, list(models) if len(models) > 1 else []
        described = {
            "hidden_size": size,
            "width": config.hidden,
            "models": known,
            "outputs": _count_outputs(task),
            **limits,
        }
        model = cls(
            encoder, RegressionHead(size, len(known), config.hidden, _count_outputs(task)), tokenizer, described
        )
        identity = {"config": asdict(config), "task": asdict(task), "data": fingerprint(train), "seed": seed}
        model._train(task, train, config, seed, TrainingState(progress, identity | described))
        return model

    @torch.no_grad()
    def scores(self, examples: Sequence[Example], batch_size: int = 32) -> np.ndarray:
        self.encoder.eval()
        self.head.eval()
        # prompts of similar length share a batch: less padding
        order = np.argsort([len(example.text) for example in examples], kind="stable")
        found = np.zeros((len(examples), self.described["outputs"]))
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            found[places] = self._forward([examples[place] for place in places]).float().cpu().numpy()
        return found

    def save(self, folder: Path) -> dict[str, Any]:
        self.encoder.save_pretrained(folder / "encoder")
        self.tokenizer.save_pretrained(folder / "encoder")
        save_file(
            {name: value.contiguous() for name, value in self.head.state_dict().items()}, folder / "head.safetensors"
        )
        return self.described

    @classmethod
    def load(cls, folder: Path, described: dict[str, Any]) -> EncoderModel:
        """Reads what `save` wrote. `UserError`: a description that is out of range or does not fit the encoder."""
        remedy = "give a folder that `lengths train` wrote"
        sizes = validate(_EncoderFile, described, f"model of {folder}", remedy)
        encoder, tokenizer = _load_pretrained(folder / "encoder")
        if encoder.config.hidden_size != sizes.hidden_size:
            raise UserError(
                f"model of {folder} has hidden_size {sizes.hidden_size}, but its encoder has "
                f"{encoder.config.hidden_size}; {remedy}."
            )
        head = RegressionHead(sizes.hidden_size, len(sizes.models), sizes.width, sizes.outputs)
        head.load_state_dict(load_file(folder / "head.safetensors"))
        return cls(encoder, head, tokenizer, described)

    def _forward(self, examples: Sequence[Example]) -> torch.Tensor:
        device = next(self.encoder.parameters()).device
        rows = [self._encode(example.text) for example in examples]
        longest, padding = max(map(len, rows)), self.tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        pooled = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
        known = self.described["models"]
        one_hot = [[float(example.model == name) for name in known] for example in examples]
        return self.head(pooled, torch.tensor(one_hot, device=device).reshape(len(examples), len(known)))

    def _encode(self, text: str) -> list[int]:
        """Special tokens around the part of the prompt that is kept; at most as long as the encoder has positions."""
        special = self.tokenizer.num_special_tokens_to_add()
        most = min(self.described["max_tokens"], getattr(self.encoder.config, "max_position_embeddings", 512))
        ids = truncate(
            self.tokenizer.encode(text, add_special_tokens=False), max(most - special, 1), self.described["truncation"]
        )
        before, after = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        return ([] if before is None else [before]) + ids + ([] if after is None else [after])

    def _train(
        self, task: LengthTask, train: Sequence[Example], config: ProxyConfig, seed: int, kept: TrainingState
    ) -> None:
        tokens = collect_lengths(train)
        targets = torch.tensor(task.labels(tokens) if task.is_classifying else task.targets(tokens).astype(np.float32))
        generator = np.random.default_rng(seed)
        everything = [*self.encoder.parameters(), *self.head.parameters()]
        optimizer = torch.optim.AdamW(everything, lr=config.learning_rate)
        modules = {"encoder": self.encoder, "head": self.head}
        for epoch in range(kept.resume(modules, optimizer, generator), config.epochs):
            frozen = epoch >= math.ceil(config.epochs / 2)
            self.encoder.requires_grad_(not frozen)
            self.encoder.train(not frozen)
            self.head.train()
            for places in _draw_batches(len(train), config.batch_size, generator):
                optimizer.zero_grad()
                loss = _loss(task, self._forward([train[place] for place in places]), targets[places])
                loss.backward()
                optimizer.step()
            if not torch.isfinite(loss):
                raise UserError(f"Training diverged in epoch {epoch + 1}; give a smaller proxy.learning_rate.")
            kept.keep(epoch + 1, modules, optimizer, generator)
        kept.clear()


def _count_outputs(task: LengthTask) -> int:
    if task.is_classifying:
        return len(task.class_tokens)
    return 1 + len(task.quantiles) if task.kind == "regression" and task.loss == "quantile" else 1


def _loss(task: LengthTask, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    targets = targets.to(scores.device)
    if task.is_classifying:
        return nn.functional.cross_entropy(scores, targets)
    if task.kind == "pairwise":
        # in every pair of the batch, the longer answer should score higher
        margins, order = scores[:, 0, None] - scores[None, :, 0], torch.sign(targets[:, None] - targets[None, :])
        return (nn.functional.softplus(-margins * order) * order.abs()).sum() / order.abs().sum().clamp(min=1)
    if task.loss == "mse":
        return nn.functional.mse_loss(scores[:, 0], targets)
    levels = [0.5, *task.quantiles] if scores.shape[1] > 1 else [0.5]
    errors = targets[:, None] - scores
    level = torch.tensor(levels, device=scores.device)
    return torch.maximum(level * errors, (level - 1) * errors).sum(1).mean()


def _draw_batches(count: int, size: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    order = generator.permutation(count)
    for start in range(0, count, size):
        yield order[start : start + size]


def _load_pretrained(path: Path) -> tuple[nn.Module, Any]:
    """Encoder and tokenizer of a local folder: safetensors only, no download, no remote code."""
    options = {"local_files_only": True, "trust_remote_code": False}
    if not (path / "config.json").is_file():
        raise UserError(f"{path} holds no config.json; give a local folder of a Hugging Face encoder.")
    check_files(path, "Encoder file", "fetch it again")
    try:
        encoder = AutoModel.from_pretrained(str(path), use_safetensors=True, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(str(path), **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{path} cannot be loaded as an encoder ({first_line(error)}).") from None
    return encoder.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
