"""Private and undocumented parts of transformers' models, which quantized folders are loaded into."""

import pytest
import torch

LIBRARY = "transformers"
SEEN = ("5.17.0", "5.24.0")

ROTARY = ("llama", "mistral", "qwen2", "qwen3")
FAMILIES = (*ROTARY, "opt", "bloom")


def config_of(family, **further):
    """A tiny configuration."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 32, "vocab_size": 40, "num_attention_heads": 4, "num_hidden_layers": 2}
    if family == "bloom":
        sizes = {"hidden_size": 32, "vocab_size": 40, "n_head": 4, "n_layer": 2}
    elif family == "opt":
        sizes |= {"ffn_dim": 64, "word_embed_proj_dim": 32}
    else:
        sizes |= {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
    return AutoConfig.for_model(family, **(sizes | further))


def test_parameters_that_share_a_tensor():
    """`model.all_tied_weights_keys`, in quant/pretrained.py: iterates over the names of parameters that are filled by
    `tie_weights()`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of("llama", tie_word_embeddings=True))
    assert set(model.all_tied_weights_keys) == {"lm_head.weight"}
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_that_hold_buffers_alone(family):
    """`type(module)(model.config)`, in quant/pretrained.py: how each module is made whose buffers no checkpoint
    holds."""
    from transformers import AutoModelForCausalLM

    config = config_of(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    holders = [module for module in model.modules() if list(module.buffers(recurse=False))]
    assert bool(holders) == (family in ROTARY)
    for module in holders:
        made = type(module)(model.config)
        assert {name for name, _ in made.named_buffers()} == {name for name, _ in module.named_buffers()}
        assert not list(made.parameters())


def test_scaled_embedding_of_gemma():
    """`module.embed_scale`, in quant/pretrained.py: the buffer by which Gemma's embedding is multiplied."""
    from transformers import AutoModelForCausalLM

    for family in ("gemma2", "gemma3_text"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_of(family))
        assert [name for name, _ in model.model.embed_tokens.named_buffers()] == ["embed_scale"]
