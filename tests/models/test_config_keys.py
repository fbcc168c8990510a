"""Keys of config.json that change what a model computes: our layers give transformers' logits, or refuse the key."""

import json

import pytest
import torch
from tiny_models import MODELS
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from ds_llmpq.errors import UserError
from ds_llmpq.models.families import describe
from ds_llmpq.models.notes import list_notes
from ds_llmpq.models.shape import read_shape
from ds_llmpq.models.step import Step
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.layers import LayerLoader
from ds_llmpq.quant.quantized_checkpoint import open_checkpoint
from scripts.make_checkpoint import make_checkpoint

SMALL = {"layers": 3, "hidden": 48, "heads": 4, "vocab": 96, "max_positions": 64, "dtype": "float32"}
TOKENS = torch.randint(0, 96, (1, 40), generator=torch.Generator().manual_seed(0))
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]
CASES = [
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": YARN | {"attention_factor": 1.7, "beta_fast": 16, "beta_slow": 2}}),
    ("llama", {"rope_theta": 300.0}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"rms_norm_eps": 0.3}),
    ("llama", {"attention_dropout": 0.5}),
    ("llama", {"pretraining_tp": 2}),
    ("llama", {"head_dim": 24}),
    ("mistral", {"sliding_window": 7}),
    ("mistral", {"hidden_act": "relu"}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "layer_types": WINDOWED}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 5}),
    ("qwen3", {"attention_bias": True}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    ("opt", {"do_layer_norm_before": False}),
    ("opt", {"activation_function": "gelu"}),
    ("opt", {"enable_bias": False}),
    ("opt", {"layer_norm_elementwise_affine": False}),
    ("opt", {"_remove_final_layer_norm": True}),
    ("opt", {"word_embed_proj_dim": 24}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ("bloom", {"layer_norm_epsilon": 0.2}),
    ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}),
]


def our_logits(folder) -> torch.Tensor:
    """[tokens, vocabulary], by the pipeline's layers one after another."""
    checkpoint = open_checkpoint(folder)
    layers = checkpoint.config.num_hidden_layers
    quant = QuantConfig(bits=[16])
    loader = LayerLoader(checkpoint, [16] * layers, quant, torch.float32, torch.device("cpu"))
    step = Step(
        positions=torch.arange(TOKENS.shape[1])[None], cache=None, kv_tokens=TOKENS.shape[1], causal_only=True,
        token_ids=TOKENS, prepare=loader.decoder.positions(),
    )  # fmt: skip
    with torch.no_grad():
        step = loader.embedding()(step)
        for index in range(layers):
            step = loader.decoder_layer(index)(step)
        return loader.head()(step).logits[0]


@pytest.mark.parametrize(("arch", "keys"), CASES, ids=[f"{arch}-{'-'.join(keys)}" for arch, keys in CASES])
def test_a_key_gives_the_logits_of_transformers(tmp_path, arch, keys):
    make_checkpoint(tmp_path, arch, tokenizer=None, config=keys, **SMALL)
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()(TOKENS).logits[0]
    found = our_logits(tmp_path)
    assert (found - wanted).abs().max() < 1e-3
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


def test_a_kind_of_layer_that_is_not_there_is_refused(tmp_path):
    types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(UserError, match=r"layer_types\[1\] is 'chunked_attention', but must be one of full_"):
        read_shape(_with(tmp_path, "qwen2", {"layer_types": types}))


def test_frequencies_that_depend_on_the_longest_row_are_named(tmp_path):
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6,
        "original_max_position_embeddings": 16, "factor": 4.0,
    }  # fmt: skip
    [note] = list_notes(_with(tmp_path, "llama", {"rope_parameters": rope}))
    assert "longrope" in note
    assert "16" in note


def _with(folder, arch: str, keys: dict):
    """The folder with these keys in config.json, as a user would write them there."""
    make_checkpoint(folder, arch, tokenizer=None, **SMALL)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return folder


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"rope_theta": []}, r"rope_parameters: rope_theta is \[\], but must be a valid number"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0, but must be greater than 0"),
        ({"rope_type": "linear", "factor": 0}, "factor is 0, but must be greater than 0"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": "x"}, "is 'x', but must be a valid"),
        ({"rope_type": "linear"}, "of the type linear that lack the key factor"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 8}, "1 numbers as short_factor"),
        ({"full_attention": {"rope_type": "default"}}, "for full_attention apart"),
        ({"partial_rotary_factor": 0.01}, "an even number of them must be rotated"),
    ],
)
def test_rope_parameters_that_make_no_frequencies_are_one_sentence(parameters, said):
    config = LlamaConfig(hidden_size=64, num_attention_heads=4).to_dict()
    config["rope_parameters"] = {"rope_type": "default", **parameters}
    with pytest.raises(UserError, match=said):
        describe(config)


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_makes_of_a_file_reads_as_the_file_itself(tmp_path, name):
    """Its configuration classes fill in defaults and translate former keys; ours are the same."""
    model_type, fields = MODELS[name]
    plain = {"model_type": model_type, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    plain |= {"vocab_size": 96, "intermediate_size": 96, "ffn_dim": 96, "head_dim": 16} | fields
    if model_type in ("llama", "mistral", "mixtral", "qwen2", "phi3", "qwen3_moe"):
        del plain["head_dim"]
    plain["num_key_value_heads"] = 2
    if model_type == "bloom":
        plain["n_head"] = fields["n_head"]
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert describe(plain).spec == describe(AutoConfig.from_pretrained(tmp_path).to_dict()).spec


@pytest.mark.parametrize(
    ("model_type", "former"),
    [
        ("llama", {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}),
        ("mixtral", {}),
        ("phi3", {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        (
            "phi3",
            {"original_max_position_embeddings": 64}
            | {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
        ),
        ("gemma3_text", {"rope_theta": 2e4, "rope_local_base_freq": 300.0, "sliding_window_pattern": 3}),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 2, "attention_bias": True}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}),
        ("bloom", {"n_embed": 128}),
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    ],
)
def test_former_keys_read_as_transformers_translates_them(tmp_path, model_type, former):
    plain = {"model_type": model_type, "hidden_size": 256, "num_hidden_layers": 7, "num_attention_heads": 32}
    plain |= {"vocab_size": 96, "intermediate_size": 96, "ffn_dim": 96} | former
    if model_type == "bloom":
        plain["n_head"] = 32
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert describe(plain).spec == describe(AutoConfig.from_pretrained(tmp_path).to_dict()).spec
