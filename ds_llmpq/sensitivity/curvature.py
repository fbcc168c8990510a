"""Curvature of the loss with respect to one decoder layer's linears, computed only from products with the Hessian."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ds_llmpq.quant.hqq import list_linears
from ds_llmpq.sensitivity.layerwise import Layerwise

_MOST_ITERATIONS = 20
_TOLERANCE = 0.01  # relative change of the eigenvalue between iterations
_PROBES = 8


class Curvature:
    """The curvature of `layers[0]`. `layers`: that one and all behind it; `hidden` [rows, length, hidden] enters it."""

    def __init__(self, model: Layerwise, layers: list[nn.Module], head: nn.Module, hidden: torch.Tensor, seed: int):
        self.model, self.layers, self.head, self.hidden = model, layers, head, hidden
        self.targets = model.targets[: len(hidden)]
        first = layers[0]
        self.weights = {name: first.get_submodule(name).weight for name in list_linears(first)}
        self.generator = torch.Generator().manual_seed(seed)

    def eigenvalue(self) -> dict[str, float]:
        """The top (most positive) eigenvalue over all linears of the layer together, by name; the same for each.

        Lanczos iteration: it keeps the vectors of power iteration orthogonal, so it finds the largest eigenvalue even
        if a negative one has a greater magnitude, and needs fewer products.
        """
        sizes = [w.numel() for w in self.weights.values()]
        basis = torch.randn(1, sum(sizes), generator=self.generator)
        basis = basis / basis.norm()
        diagonal: list[float] = []
        beside: list[float] = []
        found = 0.0
        with self._differentiable():
            for _ in range(_MOST_ITERATIONS):
                parts = zip(self.weights.values(), basis[-1].split(sizes), strict=True)
                products = self._products([part.reshape(w.shape).to(w) for w, part in parts])
                vector = torch.cat([product.flatten().float().cpu() for product in products])
                diagonal.append(float(vector @ basis[-1]))
                previous, found = found, _top(diagonal, beside)
                for _ in range(2):  # twice is enough to stay orthogonal in float32
                    vector = vector - basis.T @ (basis @ vector)
                norm = float(vector.norm())
                settled = len(diagonal) > 1 and abs(found - previous) <= _TOLERANCE * abs(found)
                if settled or norm <= 1e-6 * max(map(abs, diagonal)):
                    break
                beside.append(norm)
                basis = torch.cat([basis, (vector / norm)[None]])
        return dict.fromkeys(self.weights, found)

    def traces(self) -> dict[str, float]:
        """Each linear's mean eigenvalue: trace of its own block / its number of weights."""
        sums = dict.fromkeys(self.weights, 0.0)
        with self._differentiable():
            for _ in range(_PROBES):
                vectors = [
                    torch.randint(0, 2, w.shape, generator=self.generator).to(w) * 2 - 1 for w in self.weights.values()
                ]
                products = self._products(vectors)
                for name, vector, product in zip(self.weights, vectors, products, strict=True):
                    sums[name] += float((vector * product).sum()) / vector.numel() / _PROBES
        return sums

    def _products(self, vectors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The Hessian of the mean loss times `vectors`, row by row, so that only one row's graph is in memory."""
        totals = [torch.zeros_like(vector) for vector in vectors]
        weights = list(self.weights.values())
        for row in range(len(self.hidden)):
            gradients = torch.autograd.grad(self._loss(row), weights, create_graph=True)
            dot = sum((gradient * vector).sum() for gradient, vector in zip(gradients, vectors, strict=True))
            for total, product in zip(totals, torch.autograd.grad(dot, weights), strict=True):
                total += product / len(self.hidden)
        return totals

    def _loss(self, row: int) -> torch.Tensor:
        hidden = self.hidden[row : row + 1]
        for layer in self.layers:
            hidden = self.model.apply(layer, hidden)
        return F.cross_entropy(self.model.compute_logits(self.head, hidden)[0], self.targets[row])

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        """Lets weights take gradients, and uses attention that can be differentiated twice."""
        for weight in self.weights.values():
            weight.requires_grad_(True)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            for weight in self.weights.values():
                weight.requires_grad_(False)


def _top(diagonal: list[float], beside: list[float]) -> float:
    """The largest eigenvalue of a symmetric tridiagonal matrix."""
    off = torch.tensor(beside[: len(diagonal) - 1], dtype=torch.float64)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    return float(torch.linalg.eigvalsh(matrix)[-1])
