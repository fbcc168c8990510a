"""Validates a parsed row: every field must be known, of the right type and in range."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.batch.parameters import PARAMETERS, show
from ds_llmpq.batch.request import CHAT_URL, COMPLETIONS_URL, Prompt, Request, RequestError, derive_seed
from ds_llmpq.errors import UserError
from ds_llmpq.scheduler.sampling_params import SamplingParams

ROW_FIELDS = frozenset({"custom_id", "method", "url", "body", "arrival_seconds"})
MESSAGE_FIELDS = frozenset({"role", "content"})
# fields that SDKs and servers add to plain-text answers; only these values are accepted
NEUTRAL_MESSAGE_FIELDS = {
    "name": (None,),
    "refusal": (None,),
    "audio": (None,),
    "function_call": (None,),
    "tool_calls": (None, []),
    "tool_call_id": (None,),
    "annotations": (None, []),
    "reasoning": (None, ""),
    "reasoning_content": (None, ""),
}
PART_FIELDS = frozenset({"type", "text"})
ROLES = ("system", "user", "assistant")
_SAMPLING_FIELDS = [field.name for field in fields(SamplingParams)]
MOST_ARRIVAL_SECONDS = 1e9
_FEW = 12  # names that a message may list
_BODY_FIELDS = {
    url: frozenset(name for name, parameter in PARAMETERS.items() if url in parameter.urls)
    for url in (CHAT_URL, COMPLETIONS_URL)
}


def parse_row(row: Any, index: int, line: int, defaults: BatchConfig) -> Request:
    """The request in a parsed row. RequestError: what is wrong with it."""
    custom_id = read_custom_id(row)
    _refuse_unknown_fields(row, ROW_FIELDS, "row")
    if _require(row, "method", str, "a string") != "POST":
        raise RequestError("invalid_method", f"method is {show(row['method'])} but only POST is served.")
    url = _require(row, "url", str, "a string")
    if url not in _BODY_FIELDS:
        raise RequestError("invalid_url", f"url is {show(url)} but only {CHAT_URL} and {COMPLETIONS_URL} are served.")
    body = _require(row, "body", dict, "an object")
    _refuse_unknown_fields(body, _BODY_FIELDS[url], "body")
    # null is the same as absent
    given = {field: PARAMETERS[field].check(field, value) for field, value in body.items() if value is not None}
    prompt = _parse_messages(body) if url == CHAT_URL else _parse_prompt(body)
    params = _build_params(given, custom_id, defaults)
    return Request(
        index,
        line,
        custom_id,
        url,
        given.get("model"),
        prompt,
        params,
        _read_arrival(row),
        bool(given.get("return_token_ids")),
    )


def _read_arrival(row: dict) -> float:
    """Arrival of a replayed request in seconds from the start; 0 by default."""
    value = row.get("arrival_seconds", 0.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < MOST_ARRIVAL_SECONDS:
        raise RequestError(
            "invalid_value",
            f"arrival_seconds is {show(value)} but must be a number from 0 to {MOST_ARRIVAL_SECONDS:.0f}.",
        )
    return float(value)


def read_custom_id(row: Any) -> str:
    """The row's custom_id, a non-empty string or a whole number as a string. RequestError otherwise."""
    if not isinstance(row, dict):
        raise RequestError("invalid_type", f"a row is an object with custom_id, method, url and body, not {show(row)}.")
    custom_id = _require(row, "custom_id", (str, int), "a string")
    if isinstance(custom_id, bool):
        raise RequestError("invalid_type", f"custom_id must be a string, not {show(custom_id)}.")
    if custom_id == "":
        raise RequestError("invalid_value", "custom_id is empty; give every row its own.")
    return str(custom_id)


def check_defaults(defaults: BatchConfig) -> None:
    """`UserError` if the configured defaults for rows are out of range."""
    for field in ("max_tokens", "temperature", "top_p", "top_k", "seed", "ignore_eos"):
        try:
            PARAMETERS[field].check(field, getattr(defaults, field))
        except RequestError as error:
            raise UserError(f"batch.{error.message}") from None
    for field in ("max_row_bytes", "limit"):
        value = getattr(defaults, field)
        if value is not None and value < 1:
            raise UserError(f"batch.{field} is {value} but must be at least 1.")


# --- fields of the body ---


def _build_params(given: dict, custom_id: str, defaults: BatchConfig) -> SamplingParams:
    """Takes validated values first, then `defaults`; what is still open is left to the checkpoint's defaults."""
    chosen = {name: getattr(defaults, name) for name in _SAMPLING_FIELDS if hasattr(defaults, name)}
    chosen["seed"] = derive_seed(defaults.seed, custom_id)
    chosen |= {name: given[name] for name in _SAMPLING_FIELDS if name in given}
    params = SamplingParams(**chosen | {"max_tokens": _choose_max_tokens(given, defaults)})
    if params.min_tokens is not None and params.min_tokens > params.max_tokens:
        raise RequestError(
            "invalid_value",
            f"min_tokens is {show(params.min_tokens)} but max_tokens is {params.max_tokens}; lower it.",
        )
    return params


def _choose_max_tokens(given: dict, defaults: BatchConfig) -> int:
    names = [field for field in ("max_tokens", "max_completion_tokens") if field in given]
    if len(names) == 2:
        raise RequestError("invalid_value", "max_tokens and max_completion_tokens are both given; keep one of them.")
    return given[names[0]] if names else defaults.max_tokens


def _parse_messages(body: dict) -> Prompt:
    messages = _require(body, "messages", list, "a list of messages")
    if not messages:
        raise RequestError("empty_prompt", "messages is empty; give at least one message.")
    return tuple(_parse_message(message, f"messages[{i}]") for i, message in enumerate(messages))


def _parse_message(message: Any, where: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise RequestError("invalid_type", f"{where} must be an object with role and content, not {show(message)}.")
    spoken = {field: value for field, value in message.items() if value not in NEUTRAL_MESSAGE_FIELDS.get(field, ())}
    _refuse_unknown_fields(spoken, MESSAGE_FIELDS, where)
    role = message.get("role")
    if role not in ROLES:
        raise RequestError("invalid_value", f"{where}.role is {show(role)} but must be one of {', '.join(ROLES)}.")
    content = message.get("content")
    if isinstance(content, list) and content:
        content = "".join([_parse_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)])
    if not isinstance(content, str):
        raise RequestError(
            "invalid_type", f"{where}.content must be a string or a list of text parts, not {show(content)}."
        )
    return role, content


def _parse_part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise RequestError(
            "unsupported_value", f'{where} must be {{"type": "text", "text": "..."}}; only text is read.'
        )
    _refuse_unknown_fields(part, PART_FIELDS, where)
    return part["text"]


def _parse_prompt(body: dict) -> Prompt:
    prompt = _require(body, "prompt", (str, list), "a string or a list of token ids")
    if not prompt:
        raise RequestError("empty_prompt", "prompt is empty; give at least one character or token id.")
    if isinstance(prompt, str):
        return prompt
    if any(type(token) is not int for token in prompt):
        raise RequestError("unsupported_value", "a prompt list may hold token ids only; give each text its own row.")
    if min(prompt) < 0:
        raise RequestError("invalid_value", f"prompt holds token id {show(min(prompt))} but ids start at 0.")
    return tuple(prompt)


def _refuse_unknown_fields(given: dict, known: frozenset[str] | set[str], where: str) -> None:
    unknown = given.keys() - known
    if unknown:
        names = ", ".join(show(name) for name in sorted(unknown)[:5])
        near = get_close_matches(min(unknown)[:60], known, n=1)
        remedy = f"did you mean {near[0]}? If not, remove it" if near else "remove it"
        if len(known) <= _FEW and not near:
            remedy += f" (known: {', '.join(sorted(known))})"
        raise RequestError("unknown_parameter", f"{where} has {names}, which is not supported here; {remedy}.")


def _require(given: dict, field: str, kind: type | tuple[type, ...], name: str) -> Any:
    if field not in given:
        raise RequestError("missing_required_parameter", f"{field} is missing; it must be {name}.")
    if not isinstance(given[field], kind):
        raise RequestError("invalid_type", f"{field} must be {name}, not {show(given[field])}.")
    return given[field]
