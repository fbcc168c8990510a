"""The parameters that the body of a request may hold: for which endpoints, and how the value is checked.

A parameter is used (sampling), has no effect on the text (`user`, a cache hint), or belongs to an unsupported feature
(`logit_bias`). Of the latter, only the neutral value ({}) is accepted, because client libraries write it into rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ds_llmpq.batch.request import CHAT_URL, COMPLETIONS_URL, RequestError
from ds_llmpq.scheduler.sampling_params import Bound, SamplingParams

MAX_STOPS = 4  # as the OpenAI interface has it
MAX_STOP_CHARACTERS = 1024  # a stop string is searched for at every token

Check = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Parameter:
    """`check(name, value)` returns the value to use, or raises RequestError; it never gets null."""

    check: Check
    urls: frozenset[str] = frozenset({CHAT_URL, COMPLETIONS_URL})


def show(value: Any) -> str:
    """A value for a message, shortened, since rows may hold megabytes."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    return text if len(text) <= 30 else text[:27] + "..."


# --- checks: each returns the value, or raises with value, bound and remedy ---


def _check_number(bound: Bound) -> Check:
    kinds = (int,) if bound.whole else (int, float)

    def check(field: str, value: Any) -> Any:
        if type(value) not in kinds:
            kind = "a whole number" if bound.whole else "a number"
            raise RequestError("invalid_type", f"{field} must be {kind} {bound.text}, not {show(value)}.")
        if not bound.low <= value <= bound.high or (bound.exclusive and value == bound.low):
            raise RequestError("invalid_value", f"{field} is {show(value)} but must be {bound.text}.")
        return value if bound.whole else float(value)

    return check


def _check_boolean(field: str, value: Any) -> bool:
    if type(value) is not bool:
        raise RequestError("invalid_type", f"{field} must be true or false, not {show(value)}.")
    return value


def _check_stop(field: str, value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise RequestError("invalid_type", f"stop must be a string or a list of strings, not {show(value)}.")
    if len(stops) > MAX_STOPS:
        raise RequestError("invalid_value", f"stop lists {len(stops)} strings but at most {MAX_STOPS} are allowed.")
    if not all(0 < len(each) <= MAX_STOP_CHARACTERS for each in stops):
        raise RequestError(
            "invalid_value", f"each stop string must have 1 to {MAX_STOP_CHARACTERS} characters; drop or shorten it."
        )
    return tuple(stops)


def _check_kind(kind: type, name: str) -> Check:
    """Accepts any value of one JSON type: it has no effect on the text, or is read elsewhere."""

    def check(field: str, value: Any) -> Any:
        if type(value) is not kind:
            raise RequestError("invalid_type", f"{field} must be {name}, not {show(value)}.")
        return value

    return check


def _allow_only(*neutral: Any, remedy: str = "drop it") -> Check:
    """Accepts only the neutral values of an unsupported feature. 0 equals 0.0, but false is not a number."""

    def check(field: str, value: Any) -> Any:
        for each in neutral:
            same_kind = isinstance(value, bool) == isinstance(each, bool)
            if same_kind and value == each and (isinstance(each, float) or type(value) is type(each)):
                return value
        # a float stands for a number of either kind
        named = [json.dumps(int(each) if isinstance(each, float) else each) for each in neutral]
        allowed = " or ".join(named or ["null"])
        raise RequestError(
            "unsupported_value", f"{field} is {_show_whole(value)} but only {allowed} is served; {remedy}."
        )

    return check


def _show_whole(value: Any) -> str:
    """`show`, but short objects and lists are shown in full."""
    if isinstance(value, (dict, list)):
        text = json.dumps(value)
        return text if len(text) <= 60 else show(value)
    return show(value)


_ANY_TEXT, _ANY_OBJECT = _check_kind(str, "a string"), _check_kind(dict, "an object")
_NO_TOOLS = _allow_only([], remedy="tools are not offered to the model, so drop it")
_NO_TOOL_CHOICE = _allow_only("none", "auto", remedy="tools are not offered to the model, so drop it")


def _in_chat(check: Check) -> Parameter:
    return Parameter(check, frozenset({CHAT_URL}))


def _in_completion(check: Check) -> Parameter:
    return Parameter(check, frozenset({COMPLETIONS_URL}))


def _accept(field: str, value: Any) -> Any:
    return value


_SAMPLING = {each.name: _check_number(each.metadata["bound"]) for each in fields(SamplingParams) if each.metadata}

PARAMETERS: dict[str, Parameter] = {
    # read by `body`
    "messages": _in_chat(_accept),
    "prompt": _in_completion(_accept),
    # how tokens are chosen, and when to stop
    **{name: Parameter(check) for name, check in _SAMPLING.items()},
    "max_completion_tokens": _in_chat(_SAMPLING["max_tokens"]),
    "stop": Parameter(_check_stop),
    "ignore_eos": Parameter(_check_boolean),
    # content of a result
    "return_token_ids": Parameter(_check_boolean),
    # without effect on the text
    "model": Parameter(_ANY_TEXT),
    "user": Parameter(_ANY_TEXT),
    "metadata": _in_chat(_ANY_OBJECT),
    "store": Parameter(_check_boolean),
    "safety_identifier": Parameter(_ANY_TEXT),
    "prompt_cache_key": Parameter(_ANY_TEXT),
    "prompt_cache_retention": Parameter(_ANY_TEXT),
    "prediction": _in_chat(_ANY_OBJECT),  # speeds up, never changes an answer
    "parallel_tool_calls": Parameter(_check_boolean),
    "service_tier": Parameter(_allow_only("auto", "default", remedy="there is one tier, so drop it")),
    # only neutral values, of the OpenAI interface
    "n": Parameter(_allow_only(1, remedy="repeat the row instead")),
    "best_of": Parameter(_allow_only(1, remedy="repeat the row instead")),
    "stream": Parameter(_allow_only(False)),
    "stream_options": Parameter(_allow_only(remedy="answers are not streamed, so drop it")),
    "logprobs": Parameter(_allow_only(False, remedy="scores of tokens are not kept, so drop it")),
    "top_logprobs": Parameter(_allow_only(0, remedy="scores of tokens are not kept, so drop it")),
    "logit_bias": Parameter(_allow_only({})),
    "response_format": Parameter(_allow_only({"type": "text"}, remedy="answers are not held to a form, so drop it")),
    "tools": Parameter(_NO_TOOLS),
    "functions": Parameter(_NO_TOOLS),
    "tool_choice": Parameter(_NO_TOOL_CHOICE),
    "function_call": Parameter(_NO_TOOL_CHOICE),
    "modalities": Parameter(_allow_only(["text"], remedy="answers are text, so drop it")),
    "audio": Parameter(_allow_only(remedy="answers are text, so drop it")),
    "web_search_options": Parameter(_allow_only(remedy="nothing is searched, so drop it")),
    "reasoning_effort": Parameter(_allow_only()),
    "verbosity": Parameter(_allow_only("medium")),
    "echo": Parameter(_allow_only(False, remedy="add the prompt to the answer yourself")),
    "suffix": Parameter(_allow_only("")),
    # and of other servers
    "length_penalty": Parameter(_allow_only(1.0)),
    "use_beam_search": Parameter(_allow_only(False)),
    "stop_token_ids": Parameter(_allow_only([], remedy="give stop strings instead")),
    "bad_words": Parameter(_allow_only([])),
    "allowed_token_ids": Parameter(_allow_only()),
    "logits_processors": Parameter(_allow_only([])),
    "include_stop_str_in_output": Parameter(_allow_only(False)),
    "skip_special_tokens": Parameter(_allow_only(True)),
    "truncate_prompt_tokens": Parameter(_allow_only(remedy="shorten the prompt instead")),
    "prompt_logprobs": Parameter(_allow_only(remedy="scores of tokens are not kept, so drop it")),
    "add_generation_prompt": Parameter(_allow_only(True)),
    "continue_final_message": Parameter(_allow_only(False)),
    "chat_template": Parameter(_allow_only(remedy="the model's own is used, so drop it")),
    "chat_template_kwargs": Parameter(_allow_only({})),
    "documents": Parameter(_allow_only([], remedy="write them into a message")),
    "priority": Parameter(_allow_only(0)),
    **dict.fromkeys(
        ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        Parameter(_allow_only(remedy="answers are not held to a form, so drop it")),
    ),
}
