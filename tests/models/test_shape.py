"""ModelShape against the modules that transformers builds (on the meta device: no memory, exact shapes)."""

import json

import pytest

from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import ModelShape, read_shape

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100}
LLAMA = {**SMALL, "intermediate_size": 96}
OPT = {**SMALL, "ffn_dim": 128}
CONFIGS = {
    "llama-defaults": {"model_type": "llama", **LLAMA},
    "llama-gqa-bias": {
        "model_type": "llama",
        **LLAMA,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "llama-null-heads": {"model_type": "llama", **LLAMA, "num_key_value_heads": None, "head_dim": None},
    "mistral-defaults": {"model_type": "mistral", **LLAMA, "num_attention_heads": 16},
    "mistral-no-window": {"model_type": "mistral", **LLAMA, "num_key_value_heads": 4, "sliding_window": None},
    "mistral-window": {"model_type": "mistral", **LLAMA, "num_key_value_heads": 2, "sliding_window": 1000},
    "qwen2-defaults": {"model_type": "qwen2", **LLAMA, "num_attention_heads": 64, "hidden_size": 256},
    "qwen2-gqa": {"model_type": "qwen2", **LLAMA, "num_key_value_heads": 2, "attention_bias": False},
    "qwen2-tied": {"model_type": "qwen2", **LLAMA, "num_key_value_heads": None, "tie_word_embeddings": True},
    "qwen2-window": {
        "model_type": "qwen2",
        **LLAMA,
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
    "qwen3-defaults": {"model_type": "qwen3", **LLAMA, "num_key_value_heads": 2},
    "qwen3-bias": {
        "model_type": "qwen3",
        **LLAMA,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "opt-defaults": {"model_type": "opt", **OPT},
    "opt-350m-like": {"model_type": "opt", **OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "opt-flags": {
        "model_type": "opt",
        **OPT,
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "max_position_embeddings": 77,
        "tie_word_embeddings": False,
    },
    "opt-old-final-norm": {"model_type": "opt", **OPT, "_remove_final_layer_norm": True},
    "bloom-defaults": {"model_type": "bloom", **SMALL},
    "bloom-old-names": {
        "model_type": "bloom",
        "n_embed": 64,
        "n_layer": 3,
        "n_head": 4,
        "vocab_size": 100,
        "tie_word_embeddings": False,
    },
}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def build(transformers, config):
    """The causal language model of a config.json on the meta device, and its config object."""
    import torch

    options = dict(config)
    kept = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(kept), kept


def parts_of(model):
    """(embedding modules, decoder layers, head modules) by the names of the supported architectures."""
    body = model.get_decoder() if model.config.model_type == "opt" else model.base_model
    layers = body.h if model.config.model_type == "bloom" else body.layers
    embed_names = ("embed_tokens", "embed_positions", "project_in", "word_embeddings", "word_embeddings_layernorm")
    head_names = ("norm", "final_layer_norm", "project_out", "ln_f")
    embed = [getattr(body, name) for name in embed_names if getattr(body, name, None) is not None]
    head = [getattr(body, name) for name in head_names if getattr(body, name, None) is not None]
    return embed, layers, [*head, model.lm_head]


def count(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_counts_and_names_equal_the_real_modules(transformers, config):
    from torch import nn

    model, kept = build(transformers, config)
    shape = ModelShape.from_config(config)
    embed, layers, head = parts_of(model)
    for layer in layers:
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        assert {linear.name: (linear.out_features, linear.in_features) for linear in shape.linears} == {
            name: (module.out_features, module.in_features) for name, module in linears.items()
        }
        assert set(shape.biased) == {name for name, module in linears.items() if module.bias is not None}
        assert shape.linear_weights == sum(module.weight.numel() for module in linears.values())
        assert shape.layer_parameters == count(layer)
    assert shape.layers == len(layers)
    assert shape.embed_parameters == count(*embed)
    assert shape.head_parameters == count(*head)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.tied_embeddings == kept.tie_word_embeddings


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_sizes_equal_the_config_class(transformers, config):
    options = dict(config)
    kept = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
    shape = ModelShape.from_config(config)
    assert (shape.hidden, shape.heads, shape.vocab) == (kept.hidden_size, kept.num_attention_heads, kept.vocab_size)
    assert shape.kv_heads == getattr(kept, "num_key_value_heads", kept.num_attention_heads)
    assert shape.max_positions == getattr(kept, "max_position_embeddings", None)
    layer_types = getattr(kept, "layer_types", None) or ["sliding_attention"]
    assert shape.sliding_window == (
        getattr(kept, "sliding_window", None) if "sliding_attention" in layer_types else None
    )
    assert shape.gated_mlp == (config["model_type"] not in ("opt", "bloom"))


def test_a_saved_config_gives_the_same_shape(transformers, tmp_path):
    """What save_pretrained writes (all keys, dtype too) reads back as the same sizes."""
    for name, config in CONFIGS.items():
        options = dict(config)
        kept = transformers.AutoConfig.for_model(options.pop("model_type"), dtype="bfloat16", **options)
        kept.save_pretrained(tmp_path / name)
        shape = read_shape(tmp_path / name)
        assert shape.fingerprint == ModelShape.from_config(config).fingerprint
        assert shape.dtype == "bfloat16"


def test_fingerprint_changes_with_a_size():
    prints = {
        ModelShape.from_config({"model_type": "llama", **LLAMA, "vocab_size": size}).fingerprint for size in (9, 10)
    }
    assert len(prints) == 2


def test_unsupported_architecture_names_the_supported_ones():
    with pytest.raises(UserError, match=r"'gpt2'.*llama, mistral, qwen2, .*gemma2, .*opt, bloom"):
        ModelShape.from_config({"model_type": "gpt2"})
    with pytest.raises(UserError, match="None is not supported"):
        ModelShape.from_config({})


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"])
def test_missing_key_is_named(missing):
    config = {key: value for key, value in CONFIGS["llama-defaults"].items() if key != missing}
    with pytest.raises(UserError, match=f"lacks the key '{missing}'"):
        ModelShape.from_config(config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 0}, "hidden_size is 0, but must be greater than or equal to 1"),
        ({"hidden_size": "64"}, "hidden_size is '64', but must be a valid integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, but must be a valid integer"),
        ({"hidden_size": 66}, "not a multiple"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes', but must be a valid boolean"),
        ({"num_hidden_layers": 10**9}, "less than or equal to 10000"),
    ],
)
def test_unusable_values_are_user_errors(change, words):
    with pytest.raises(UserError, match=words):
        ModelShape.from_config({**CONFIGS["llama-defaults"], **change})


def test_read_shape_errors(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_shape(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config\.json"):
        read_shape(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(UserError, match="as JSON"):
        read_shape(tmp_path)
    file.write_text("[]")
    with pytest.raises(UserError, match="must be an object"):
        read_shape(tmp_path)
    file.write_text(json.dumps(CONFIGS["bloom-defaults"]))
    assert read_shape(tmp_path).max_positions is None
