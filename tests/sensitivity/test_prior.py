"""The data-free prior: its published figures, its law, and the table made from it."""

import math

import pytest

from ds_llmpq.errors import UserError
from ds_llmpq.sensitivity.prior import make_prior, model_loss


def test_losses_from_published_perplexities():
    """Geometric mean of the six perplexity ratios, from products instead of sums of logarithms."""
    product = (14.13 / 13.50) * (24.27 / 23.14) * (16.68 / 16.16) * (15.67 / 14.61) * (18.30 / 16.98) * (15.55 / 14.73)
    assert math.exp(model_loss(4)) == pytest.approx(product ** (1 / 6))
    product = (17.33 / 13.50) * (30.57 / 23.14) * (19.43 / 16.16) * (21.30 / 14.61) * (25.87 / 16.98) * (19.74 / 14.73)
    assert math.exp(model_loss(3)) == pytest.approx(product ** (1 / 6))


def test_law_of_the_step_for_unmeasured_widths():
    assert model_loss(2) == pytest.approx(model_loss(3) * (7 / 3) ** 2)
    assert model_loss(8) == pytest.approx(model_loss(4) * (15 / 255) ** 2)
    losses = [model_loss(bits) for bits in (16, 8, 4, 3, 2, 1)]
    assert losses == sorted(losses)
    assert losses[0] == 0
    with pytest.raises(UserError, match="no prior for 5 bits"):
        model_loss(5)


def test_table_sums_to_the_model():
    table = make_prior(12, [4, 3, 16], "print")
    assert (table.provenance, table.model_fingerprint) == ("assumed", "print")
    for column, bits in enumerate(table.bits):
        assert sum(row[column] for row in table.table) == pytest.approx(model_loss(bits))
