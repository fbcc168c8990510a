"""The checkpoint's tokenizer gives what transformers' gives; its template sees one time a run."""

import datetime
import json
import shutil
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ds_llmpq.batch.prompts import encode_all, render_chat
from ds_llmpq.batch.request import CHAT_URL, COMPLETIONS_URL, Request
from ds_llmpq.models.tokenizer import load_tokenizer

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
MESSAGES = (("system", "Be brief."), ("user", "What  does islink do ?"), ("assistant", "It tells."), ("user", "Who?"))
CLOCK = "{{ bos_token }}{{ strftime_now('%d %b %Y %H:%M:%S') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def folder_with(tmp_path):
    """folder_with(key=value, ...): the shipped model with other keys in tokenizer_config.json; None takes one away."""

    def make(**keys) -> Path:
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        file = folder / "tokenizer_config.json"
        config = json.loads(file.read_text()) | keys
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
        return folder

    return make


def encode(request, tokenizer):
    [(_, ids)] = encode_all([request], tokenizer)
    return ids


def request(prompt, url=CHAT_URL) -> Request:
    return Request(0, 1, "a", url, None, prompt, None)


def as_transformers(folder, prompt) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": role, "content": content} for role, content in prompt]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def test_a_template_that_asks_for_the_time_gets_one_time_a_run(folder_with):
    folder = folder_with(chat_template=CLOCK)
    (folder / "chat_template.jinja").unlink()
    chat, told = request((("user", "hi"),)), "2026-07-14T10:20:30"
    first = render_chat(chat, load_tokenizer(str(folder), template_time=told))
    assert first == "<|begin|>14 Jul 2026 10:20:30hi"
    time.sleep(1.1)
    assert render_chat(chat, load_tokenizer(str(folder), template_time=told)) == first
    later = load_tokenizer(str(folder))
    rendered = render_chat(chat, later)
    assert rendered != first
    time.sleep(1.1)
    assert render_chat(chat, later) == rendered


NAMED = [{"name": "default", "template": "D{% for m in messages %}{{ m['content'] }}{% endfor %}"},
         {"name": "tool_use", "template": "T{% for m in messages %}{{ m['content'] }}{% endfor %}"}]  # fmt: skip
KEYS = [
    {"chat_template": "[{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}]{{ eos_token }}"},
    {"chat_template": NAMED},
    {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}, {"add_prefix_space": True},
    {"clean_up_tokenization_spaces": True}, {"padding_side": "right"}, {"truncation_side": "left"},
    {"model_max_length": 4}, {"model_max_length": 10**30}, {"bos_token": "<|user|>"}, {"bos_token": None},
    {"eos_token": "<|user|>"}, {"pad_token": None}, {"unk_token": "<|pad|>"}, {"legacy": True}, {"legacy": False},
    {"use_default_system_prompt": True}, {"split_special_tokens": True},
    {"extra_special_tokens": ["<|system|>"]}, {"additional_special_tokens": ["<|user|>", "islink"]},
    {"added_tokens_decoder": {"2050": {"content": "islink", "special": True, "lstrip": True, "rstrip": False,
                                       "normalized": False, "single_word": False}}},
]  # fmt: skip


@pytest.mark.parametrize("keys", KEYS, ids=lambda keys: "-".join(f"{key}={value!s:.12}" for key, value in keys.items()))
def test_a_key_gives_the_prompts_of_transformers(folder_with, keys):
    folder = folder_with(**keys)
    if "chat_template" in keys:
        (folder / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(str(folder))
    text = "def islink (path) :<|user|> x , y  <|end|>"
    assert encode(request(MESSAGES), tokenizer) == as_transformers(folder, MESSAGES)
    assert encode(request(text, COMPLETIONS_URL), tokenizer) == as_transformers(folder, text)


def test_a_template_file_wins_over_the_key_and_named_files_are_there(folder_with):
    folder = folder_with(chat_template="KEY")
    (folder / "chat_template.jinja").write_text("FILE{{ messages[0]['content'] }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS")
    tokenizer = load_tokenizer(str(folder))
    assert encode(request(MESSAGES), tokenizer) == as_transformers(folder, MESSAGES)
    assert render_chat(request(MESSAGES), tokenizer).startswith("FILE")


@pytest.mark.parametrize("before", ["", "\n", "  ", " \n ", "{#- note -#}", "  {# note #}\n", "x "])
@pytest.mark.parametrize("form", ["%Y-%m-%d", "%d %b %Y", "%-d. %B, %A", "100%% %d%%d", "%Hh", "no", "%d/%m/%y %I%p"])
def test_a_frozen_clock_renders_what_transformers_renders(folder_with, monkeypatch, before, form):
    """transformers' own clock, stopped for this test by its private name."""
    from transformers.utils import chat_template_utils

    now = datetime.datetime(2026, 3, 4, 15, 6, 7)

    class Stopped(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return now

    monkeypatch.setattr(chat_template_utils, "datetime", Stopped)
    lines = [
        "{%- macro day() %}{{ strftime_now(form) }}{% endmacro %}",
        "{% if strftime_now is defined %}",
        "<{{ day() }}>",
    ]
    template = before + "{% set form = '" + form + "' %}" + "\n".join(lines) + "\n  {% endif %}\n"
    folder = folder_with(chat_template=template)
    (folder / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(str(folder), template_time=now.isoformat())
    found = render_chat(request((("user", "hi"),)), tokenizer)
    assert now.strftime(form) in found
    plain = AutoTokenizer.from_pretrained(folder)
    assert found == plain.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
