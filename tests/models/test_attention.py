"""Our decode attention against transformers' own, and what makes it different: no head is taken alone."""

import types

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ds_llmpq.models.attention import NAME, attend


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 1), (3, 3)])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_same_as_transformers(heads, groups, tokens, masked, dtype, tolerance):
    torch.manual_seed(heads * tokens)
    module = types.SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
    query = torch.randn(3, tokens, heads, 8, dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(3, groups, 9, 8, dtype=dtype)[:, :, : 9 if tokens == 1 else tokens] for _ in range(2))
    mask = None
    if masked:
        mask = torch.rand(3, 1, tokens, key.shape[2]) < 0.7
        mask[..., 0] = True
    ours, _ = attend(module, query, key, value, mask, scaling=0.3)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    assert ours.shape == theirs.shape == (3, tokens, heads, 8)
    assert (ours - theirs).abs().max() <= tolerance


def test_transformers_finds_it_by_name():
    assert AttentionInterface()[NAME] is attend
