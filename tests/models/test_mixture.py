"""A mixture of experts as planning sees it: all experts stored, few at work."""

import pytest

from ds_llmpq.cost.arithmetic import linear_flops
from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import ModelShape

CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "vocab_size": 100,
}
ATTENTION = 64 * 64 * 2 + 32 * 64 * 2
EXPERT = 3 * 64 * 128


def test_all_experts_are_stored_and_one_in_four_works():
    shape = ModelShape.from_config(CONFIG)
    assert shape.linear_weights == ATTENTION + 4 * EXPERT
    assert shape.active_linear_weights == ATTENTION + EXPERT
    assert shape.layer_other_parameters == 2 * 64 + 4 * 64
    assert linear_flops(shape, 10) == 2 * 10 * (ATTENTION + EXPERT)


def test_one_token_reads_one_expert_and_many_read_all():
    shape = ModelShape.from_config(CONFIG)
    assert shape.touched_share(1) == pytest.approx((ATTENTION + EXPERT) / shape.linear_weights)
    shares = [shape.touched_share(rows) for rows in (1, 2, 4, 64, 4096)]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_with_all_experts_at_work_it_is_a_dense_model_of_their_sum():
    every = ModelShape.from_config({**CONFIG, "num_experts_per_tok": 4})
    assert every.active_linear_weights == every.linear_weights
    assert every.touched_share(1) == 1.0
    with pytest.raises(UserError, match="more than its 4 experts"):
        ModelShape.from_config({**CONFIG, "num_experts_per_tok": 5})
