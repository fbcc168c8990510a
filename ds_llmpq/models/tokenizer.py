"""Loads a checkpoint's tokenizer, from its folder alone."""

from __future__ import annotations

import datetime
import json
import string
from typing import Any

from ds_llmpq.errors import UserError, first_line
from ds_llmpq.files import check_files


def load_tokenizer(model_path: str, trust_remote_code: bool = False, template_time: str | None = None) -> Any:
    """The tokenizer; `UserError` if there is none that works.

    Its chat template always sees the same time, `template_time` (ISO, local) or the time of loading, because a prompt
    must not depend on the second in which it is rendered.
    """
    from transformers import AutoTokenizer

    check_files(model_path, "Tokenizer file", "fetch the checkpoint again")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # damaged tokenizer files raise many types
        why = first_line(error)
        raise UserError(f"{model_path} has no usable tokenizer ({why}); fetch the checkpoint again.") from None
    now = datetime.datetime.fromisoformat(template_time) if template_time else datetime.datetime.now()
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = {name: _fix_clock(now, text) for name, text in tokenizer.chat_template.items()}
    elif tokenizer.chat_template is not None:
        tokenizer.chat_template = _fix_clock(now, tokenizer.chat_template)
    return tokenizer


_CLOCK = "strftime_now"  # the function that transformers passes to templates


def _fix_clock(now: datetime.datetime, template: str) -> str:
    """Puts a macro of the clock's name before a template that reads the clock. transformers lets us pass plain data to
    a template, but no functions, so the macro replaces each directive by its text."""
    if _CLOCK not in template:
        return template
    directives = [f"%{flag}{letter}" for flag in ("-", "") for letter in string.ascii_letters]
    texts = [("%%", "\0"), *((name, text) for name in directives if (text := now.strftime(name)) != name), ("\0", "%")]
    chain = "".join(f"|replace({json.dumps(name)}, {json.dumps(text)})" for name, text in texts)
    # a block that begins a line strips the blanks before it, but the first block no longer begins one
    rest = template.lstrip(" \t")
    rest = rest if rest.startswith(("{%", "{#")) and not rest.startswith(("{%+", "{#+")) else template
    return f'{{% macro {_CLOCK}(format) %}}{{{{ format{chain} }}}}{{% endmacro %}}{{{{ "" }}}}{rest}'
