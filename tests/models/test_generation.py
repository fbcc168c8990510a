"""generation_config.json: what is taken of it, what is named as left out, and what is refused."""

import json
from pathlib import Path

import pytest
from transformers import GenerationConfig

from ds_llmpq.errors import UserError
from ds_llmpq.models import generation
from ds_llmpq.models.generation import NAME, Generation, load_generation, read_generation
from ds_llmpq.models.notes import list_notes

CONFIG = {"model_type": "llama", "eos_token_id": 1}


def read(folder: Path, values, config=None) -> Generation:
    if values is not None:
        (folder / NAME).write_text(json.dumps(values))
    return read_generation(folder, CONFIG if config is None else config, 128)


def test_no_file_and_neutral_values_have_no_effect(tmp_path):
    assert read(tmp_path, None) == Generation(eos_token_ids=(1,))
    defaults = GenerationConfig()._get_default_generation_params()
    neutral = read(tmp_path, {**defaults, "eos_token_id": 1, "pad_token_id": 2, "transformers_version": "5"})
    assert neutral.lines() == []
    assert not neutral.effective


@pytest.mark.parametrize(
    ("values", "config", "found"),
    [
        ({"eos_token_id": 7}, {}, (7,)),
        ({"eos_token_id": [7, 9]}, {}, (7, 9)),
        (None, {"eos_token_id": 3}, (3,)),
        (None, {"eos_token_id": [3, 4]}, (3, 4)),
        (None, {}, (2,)),  # of transformers' configuration class
        (None, {"eos_token_id": None}, ()),
        (None, {"model_type": "qwen2"}, ()),
        ({"bos_token_id": 0}, {"eos_token_id": 3}, (3,)),
    ],
)
def test_end_of_sequence_tokens(tmp_path, values, config, found):
    assert read(tmp_path, values, {"model_type": "llama"} | config).eos_token_ids == found


def test_what_is_taken_and_what_is_not_is_said_in_two_lines(tmp_path):
    values = {
        "eos_token_id": [1, 2], "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "do_sample": True,
        "num_beams": 4, "stop_strings": "END", "max_new_tokens": 99,
    }  # fmt: skip
    taken, left = read(tmp_path, values).lines()
    assert taken == f"defaults from {NAME}: repetition_penalty 1.1, stop_strings ['END']"
    for name in ("temperature 0.7", "top_p 0.8", "do_sample True", "num_beams 4", "max_new_tokens 99"):
        assert name in left
    assert "batch.*" in left


def test_every_key_of_transformers_is_honoured_named_or_without_effect():
    """A key that a later transformers adds fails here until somebody has decided."""
    without_effect = {
        "early_stopping", "length_penalty",  # of beams
        "use_cache", "cache_config", "max_cache_len", "low_memory", "prefill_chunk_size", "compile_config",
        "disable_compile", "continuous_batching_config", "output_attentions", "output_hidden_states", "output_scores",
        "output_logits", "return_dict_in_generate", "renormalize_logits",  # how, not what
        "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
        "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_mtp",  # same tokens, or need a model
        "decoder_start_token_id", "bos_token_id", "pad_token_id", "transformers_version",  # of encoders; of padding
    }  # fmt: skip
    known = {
        "eos_token_id",
        "cache_implementation",
        *generation._Honoured.__dataclass_fields__,
        *generation._LEFT_OUT,
        *without_effect,
    }
    keys = {key for key in GenerationConfig().__dict__ if not key.startswith("_")}
    assert keys - known == set()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", [[1]]), ("eos_token_id", "1"), ("eos_token_id", 1.5), ("eos_token_id", True),
        ("eos_token_id", {}), ("eos_token_id", 10**30), ("repetition_penalty", 0), ("repetition_penalty", "1.1"),
        ("repetition_penalty", -1), ("repetition_penalty", 10**200), ("no_repeat_ngram_size", -1),
        ("no_repeat_ngram_size", 2.5), ("min_new_tokens", [3]), ("min_length", "x"), ("suppress_tokens", ["a"]),
        ("begin_suppress_tokens", {"a": 1}), ("bad_words_ids", [1]), ("bad_words_ids", [[]]),
        ("bad_words_ids", [[128]]), ("sequence_bias", [[1, 2.0]]), ("sequence_bias", [[[1], "x"]]),
        ("sequence_bias", {"a": 1}), ("forced_bos_token_id", 128), ("forced_bos_token_id", [1]),
        ("forced_eos_token_id", [-1]), ("forced_eos_token_id", []), ("exponential_decay_length_penalty", [1]),
        ("exponential_decay_length_penalty", [1.5, 2]), ("exponential_decay_length_penalty", [1, -2]),
        ("min_p", 2), ("typical_p", 0), ("top_h", "a"), ("epsilon_cutoff", -1), ("eta_cutoff", []),
        ("stop_strings", [1]), ("stop_strings", ""),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_one_sentence(tmp_path, key, value):
    with pytest.raises(UserError, match=f"{key}.* but .*must .* mend or remove") as error:
        read(tmp_path, {key: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b'{"min_p": %d}' % 10**400,
        b'{"min_p": 0, "min_p": 1}',
        b'{"a": NaN}',
        b'{"eos_token_id": [1',
        b"[1]",
        b"7",
        b"\xff\xfe{\x00",
        b"[" * 100_000,
        b"",
        b"1" * 9999,
    ],
)
def test_a_file_that_is_no_object_is_one_sentence(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(UserError, match="fetch the file again") as error:
        read(tmp_path, None)
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_changes_nothing(tmp_path):
    (tmp_path / NAME).write_bytes(b'\xef\xbb\xbf{"min_p": 0.25}')
    assert read(tmp_path, None).min_p == 0.25


def test_a_folder_or_a_dangling_link_in_its_place_is_one_sentence(tmp_path):
    (tmp_path / NAME).symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path, None)
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        read(tmp_path, None)


def test_the_shipped_model_needs_no_note():
    folder = Path(__file__).parents[1] / "assets" / "tiny-llama"
    assert list_notes(folder) == []
    assert load_generation(folder).eos_token_ids == (1,)
