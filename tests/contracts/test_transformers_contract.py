"""Private and undocumented parts of transformers: what its configurations say beside their documented fields."""

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


def test_final_norm_of_opt():
    """`config._remove_final_layer_norm`, in models/families/opt.py: of OPT, False unless the file says so."""
    assert config_of("opt")._remove_final_layer_norm is False
    assert config_of("opt", _remove_final_layer_norm=True)._remove_final_layer_norm is True


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


def test_windows_of_layers():
    """`layer_types`, in models/families/llama.py: each layer's kind in the configurations that have them, windowed ones
    being `sliding_attention`."""
    config = config_of("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1)
    assert config.layer_types == ["full_attention", "sliding_attention"]
    assert config.sliding_window == 5
    assert config_of("mistral", sliding_window=5).sliding_window == 5


@pytest.mark.parametrize("family", ROTARY)
def test_parameters_of_rotary_positions(family):
    """`config.rope_parameters`, in models/rotary.py: theta and kind of scaling in one dictionary, also where
    config.json has them apart."""
    config = config_of(family, rope_theta=500.0, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert config.rope_parameters["rope_theta"] == 500.0
    assert (config.rope_parameters["rope_type"], config.rope_parameters["factor"]) == ("linear", 2.0)
    assert config_of(family).rope_parameters["rope_type"] == "default"


def test_parameters_of_rotary_positions_by_kind_of_layer():
    """`config.rope_parameters`, in models/families/gemma.py: of Gemma 3, a dictionary for each kind of layer."""
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(rope_theta=2e4, rope_local_base_freq=300.0)
    assert set(config.layer_types) == set(config.rope_parameters) == {"full_attention", "sliding_attention"}
    assert config.rope_parameters["full_attention"]["rope_theta"] == 2e4
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 300.0


def test_scaled_embedding_of_gemma():
    """`module.embed_scale`, in quant/pretrained.py: the buffer by which Gemma's embedding is multiplied."""
    from transformers import AutoModelForCausalLM

    for family in ("gemma2", "gemma3_text"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_of(family))
        assert [name for name, _ in model.model.embed_tokens.named_buffers()] == ["embed_scale"]
