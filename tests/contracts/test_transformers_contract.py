"""Private and undocumented parts of transformers: its modelling files, and what a model can be told from outside."""

import pytest
import torch
from contract_checks import parameters, takes

LIBRARY = "transformers"
SEEN = ("5.17.0", "5.24.0")

ROTARY = ("llama", "mistral", "qwen2", "qwen3")
FAMILIES = (*ROTARY, "opt", "bloom")
ROWS, TOKENS = 2, 3


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


class RecordingCache:
    """Only what our caches have."""

    def __init__(self):
        self.calls = []

    def update(self, key, value, layer_idx, *args, **kwargs):
        self.calls.append((tuple(key.shape), tuple(value.shape), layer_idx))
        return key, value


def layer_step(config, cache):
    """Our layer 1 of the family run over a prompt; the hidden states behind it."""
    from ds_llmpq.models.architecture import architecture_of
    from ds_llmpq.models.step import Step

    architecture = architecture_of(config)
    layer = architecture.layer(config, 1).eval()
    step = Step(positions=torch.arange(TOKENS).expand(ROWS, TOKENS), cache=cache, kv_tokens=TOKENS, causal_only=True)
    step.hidden, step.prepare = torch.randn(ROWS, TOKENS, 32), architecture.positional(config)
    with torch.inference_mode():
        return layer(step).hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_need_an_update_alone(family):
    """`.update(key, value, layer_idx, ...)`, in engine/kv_cache.py: all that a layer asks of a cache; called once a
    layer with keys and values [rows, key/value heads, tokens, size] and returning those attention uses."""
    from ds_llmpq.models import attention

    config = config_of(family)
    config._attn_implementation = attention.NAME
    cache = RecordingCache()
    hidden = layer_step(config, cache)
    heads = 2 if family in ROTARY else 4
    assert cache.calls == [((ROWS, heads, TOKENS, 8), (ROWS, heads, TOKENS, 8), 1)]
    assert hidden.shape == (ROWS, TOKENS, 32)


@pytest.mark.parametrize("family", [*ROTARY, "opt"])
def test_arguments_of_decoder_layers(family):
    """`self.layer(hidden, attention_mask, position_ids, use_cache, ...)`, in models/architecture.py: keywords of a
    decoder layer's forward, the cache under `cache` or `past_key_values`; returns hidden states, not a tuple."""
    from ds_llmpq.models.architecture import architecture_of

    config = config_of(family)
    config._attn_implementation = "eager"
    forward = architecture_of(config).layer(config, 0).layer.forward
    names = parameters(forward)
    assert names[0] == "hidden_states"
    assert {"attention_mask", "position_ids", "use_cache"} <= set(names)
    assert len({"cache", "past_key_values"} & set(names)) == 1
    assert "position_embeddings" in names or family == "opt"


@pytest.mark.parametrize("family", ROTARY)
def test_classes_of_the_rotary_families(family):
    """`modeling_*.DecoderLayer`, in models/llama_like.py: the layer made from (configuration, index), its norm from
    (size, eps), and the rotary embedding from the configuration, giving (cosines, sines) [rows, tokens, head size]."""
    import importlib

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    assert parameters(getattr(module, f"{name}DecoderLayer").__init__) == ["config", "layer_idx"]
    norm = getattr(module, f"{name}RMSNorm")(32, eps=1e-3)
    assert [tuple(parameter.shape) for parameter in norm.parameters()] == [(32,)]
    rotary = getattr(module, f"{name}RotaryEmbedding")(config_of(family))
    positions = torch.arange(TOKENS).expand(ROWS, TOKENS)
    angles = rotary(torch.zeros(ROWS, TOKENS, 32), positions)
    assert [tuple(part.shape) for part in angles] == [(ROWS, TOKENS, 8)] * 2


def test_positions_of_opt():
    """`OPTLearnedPositionalEmbedding`, in models/opt.py: two rows longer than it is asked to be, and looked up by
    `position_ids` alone, the mask being None."""
    from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

    positions = OPTLearnedPositionalEmbedding(10, 4)
    assert positions.weight.shape == (12, 4)
    found = positions(None, position_ids=torch.tensor([[0, 9]]))
    assert torch.equal(found, positions.weight[[2, 11]][None])


def test_final_norm_of_opt():
    """`config._remove_final_layer_norm`, in models/opt.py: in configurations of OPT, False unless the file says so."""
    assert config_of("opt")._remove_final_layer_norm is False
    assert config_of("opt", _remove_final_layer_norm=True)._remove_final_layer_norm is True


def test_block_of_bloom():
    """`BloomBlock`, in models/bloom.py: made from (configuration, index), called with (hidden states, ALiBi, additive
    mask, layer_past=, use_cache=), and returns a pair."""
    from transformers.models.bloom.modeling_bloom import BloomBlock

    assert parameters(BloomBlock.__init__) == ["config", "layer_idx"]
    assert parameters(BloomBlock.forward)[:3] == ["hidden_states", "alibi", "attention_mask"]
    takes(BloomBlock.forward, "layer_past", "use_cache")


def test_alibi_of_bloom():
    """`build_alibi_tensor(mask, heads, dtype)`, in models/bloom.py: biases [rows x heads, 1, tokens], of a key's
    position alone."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    found = build_alibi_tensor(torch.ones(ROWS, TOKENS, dtype=torch.long), 4, torch.float32)
    assert found.shape == (ROWS * 4, 1, TOKENS)
    assert torch.equal(found[0, 0] * 2, found[0, 0, 2] * torch.arange(TOKENS))


@pytest.mark.parametrize("family", [*ROTARY, "opt"])
def test_attention_by_its_name(family):
    """`config._attn_implementation`, in models/attention.py: the name of the attention that layers call, one that was
    registered with `AttentionInterface`; called with (module, query, key, value, mask, scaling=, ...)."""
    from transformers import AttentionInterface

    calls = []

    def attend(module, query, key, value, attention_mask, scaling=None, **options):
        calls.append((tuple(query.shape), tuple(key.shape), tuple(value.shape), scaling))
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register("ds_llmpq_contract", attend)
    config = config_of(family)
    config._attn_implementation = "ds_llmpq_contract"
    layer_step(config, None)
    heads = 2 if family in ROTARY else 4
    ((query, key, value, scaling),) = calls
    assert (query, key, value) == ((ROWS, 4, TOKENS, 8), (ROWS, heads, TOKENS, 8), (ROWS, heads, TOKENS, 8))
    assert scaling == pytest.approx(8**-0.5) or family == "opt"  # OPT scales its queries itself


def test_attention_left_to_transformers():
    """`config._attn_implementation = None`, in models/attention.py: takes a choice back, so that a model made from the
    configuration has transformers' own."""
    from transformers import AutoModelForCausalLM

    config = config_of("llama")
    config._attn_implementation = "ds_llmpq_sdpa"
    config._attn_implementation = None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_attention_we_hand_on_to():
    """`sdpa_attention_forward`, in models/attention.py: (module, query, key, value, mask, scaling=), returns ([rows,
    tokens, heads, size], None)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    assert parameters(sdpa_attention_forward)[:5] == ["module", "query", "key", "value", "attention_mask"]
    takes(sdpa_attention_forward, "scaling")
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    key = torch.randn(ROWS, 2, TOKENS, 8)
    found, weights = sdpa_attention_forward(module, torch.randn(ROWS, 4, TOKENS, 8), key, key, None, scaling=0.5)
    assert found.shape == (ROWS, TOKENS, 4, 8)
    assert weights is None


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


@pytest.mark.parametrize("family", ROTARY)
def test_attributes_of_a_layer(family):
    """`attention.head_dim`, in quant/openvino_layer.py: with `scaling`, `config.hidden_act`, the norms'
    `variance_epsilon` and the names of a layer's parts all that the graph is built from."""
    from ds_llmpq.models.architecture import architecture_of

    config = config_of(family, hidden_act="gelu_new")
    config._attn_implementation = "eager"
    layer = architecture_of(config).layer(config, 0).layer
    attention = layer.self_attn
    assert (attention.head_dim, attention.config.hidden_act) == (8, "gelu_new")
    assert attention.scaling == pytest.approx(8**-0.5)
    assert layer.input_layernorm.variance_epsilon == config.rms_norm_eps
    assert layer.post_attention_layernorm.variance_epsilon == config.rms_norm_eps
    assert {name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)} == {
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    }
    assert hasattr(attention, "q_norm") == hasattr(attention, "k_norm") == (family == "qwen3")


def test_windows_of_layers():
    """`layer_types`, in models/llama_like.py: each layer's kind in the configurations that have them, windowed ones
    being `sliding_attention`."""
    config = config_of("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1)
    assert config.layer_types == ["full_attention", "sliding_attention"]
    assert config.sliding_window == 5
    assert config_of("mistral", sliding_window=5).sliding_window == 5
