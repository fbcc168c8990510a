"""The checkpoint's tokenizer, from its own folder alone."""

from __future__ import annotations

import datetime
import json
import string
from typing import Any

from ds_llmpq.errors import UserError
from ds_llmpq.files import check_files


def load_tokenizer(model_path: str, trust_remote_code: bool = False, template_time: str | None = None) -> Any:
    """The tokenizer; `UserError` where there is none that can be used.

    Its chat template sees one time, however long it renders: `template_time` (ISO, local), or when it was loaded. A
    prompt must not depend on the second in which it is rendered.
    """
    from transformers import AutoTokenizer

    check_files(model_path, "Tokenizer file", "fetch the checkpoint again")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a damaged tokenizer file fails in many ways, all of them the checkpoint's
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{model_path} has no usable tokenizer ({reason}); fetch the checkpoint again.") from None
    now = datetime.datetime.fromisoformat(template_time) if template_time else datetime.datetime.now()
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = {name: _fix_clock(now, text) for name, text in tokenizer.chat_template.items()}
    elif tokenizer.chat_template is not None:
        tokenizer.chat_template = _fix_clock(now, tokenizer.chat_template)
    return tokenizer


_CLOCK = "strftime_now"  # what transformers gives to templates


def _fix_clock(now: datetime.datetime, template: str) -> str:
    """A template that reads the clock, with a macro of the same name before it. transformers passes plain data to a
    template, no functions, so the macro replaces each directive by its text."""
    if _CLOCK not in template:
        return template
    directives = [f"%{flag}{letter}" for flag in ("-", "") for letter in string.ascii_letters]
    texts = [("%%", "\0"), *((name, text) for name in directives if (text := now.strftime(name)) != name), ("\0", "%")]
    chain = "".join(f"|replace({json.dumps(name)}, {json.dumps(text)})" for name, text in texts)
    # blocks strip blanks before them where they begin a line, which the first one does no more
    rest = template.lstrip(" \t")
    rest = rest if rest.startswith(("{%", "{#")) and not rest.startswith(("{%+", "{#+")) else template
    return f'{{% macro {_CLOCK}(format) %}}{{{{ format{chain} }}}}{{% endmacro %}}{{{{ "" }}}}{rest}'
