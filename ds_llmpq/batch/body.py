"""Checks of one parsed row: every field is known, of the right type and in range, or the row is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_llmpq.batch.request import CHAT_URL, COMPLETIONS_URL, Prompt, Request, RequestError, SamplingParams, derive_seed
from ds_llmpq.errors import UserError
from ds_llmpq.schema import BatchConfig

ROW_FIELDS = frozenset({"custom_id", "method", "url", "body", "arrival_seconds"})
MESSAGE_FIELDS = frozenset({"role", "content"})
PART_FIELDS = frozenset({"type", "text"})
ROLES = ("system", "user", "assistant")
# `user` and `metadata` have no effect on the text: accepted and ignored
SAMPLING_FIELDS = frozenset({"max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos"})
COMMON_FIELDS = SAMPLING_FIELDS | {"model", "n", "stream", "logprobs", "user"}
BODY_FIELDS = {
    CHAT_URL: COMMON_FIELDS | {"messages", "max_completion_tokens", "metadata"},
    COMPLETIONS_URL: COMMON_FIELDS | {"prompt"},
}
MAX_STOPS = 4  # as the OpenAI interface has it
MAX_STOP_CHARACTERS = 1024  # a stop string is searched for at every token
SEED_BOUND = 2**63
MOST_ARRIVAL_SECONDS = 1e9


def parse_row(row: Any, index: int, line: int, defaults: BatchConfig) -> Request:
    """The request a parsed row asks for; RequestError says what is wrong with it.

    `custom_id` has already been checked (`row_custom_id`), since error rows need it too.
    """
    _no_unknown_fields(row, ROW_FIELDS, "row")
    if _required(row, "method", str, "a string") != "POST":
        raise RequestError("invalid_method", f"method is {show(row['method'])} but only POST is served.")
    url = _required(row, "url", str, "a string")
    if url not in BODY_FIELDS:
        raise RequestError("invalid_url", f"url is {show(url)} but only {CHAT_URL} and {COMPLETIONS_URL} are served.")
    body = _required(row, "body", dict, "an object")
    _no_unknown_fields(body, BODY_FIELDS[url], "body")
    _check_unused(body)
    prompt = _messages(body) if url == CHAT_URL else _prompt(body)
    params = _params(body, row["custom_id"], defaults)
    return Request(index, line, row["custom_id"], url, body.get("model"), prompt, params, _arrival(row))


def _arrival(row: dict) -> float:
    """When a replayed request comes, in seconds from the start; 0 where the row does not say."""
    value = row.get("arrival_seconds", 0.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < MOST_ARRIVAL_SECONDS:
        raise RequestError(
            "invalid_value",
            f"arrival_seconds is {show(value)} but must be a number from 0 to {MOST_ARRIVAL_SECONDS:.0f}.",
        )
    return float(value)


def row_custom_id(row: Any) -> str:
    """The row's custom_id, a non-empty string; RequestError otherwise."""
    if not isinstance(row, dict):
        raise RequestError("invalid_type", f"a row is an object with custom_id, method, url and body, not {show(row)}.")
    custom_id = _required(row, "custom_id", str, "a string")
    if not custom_id:
        raise RequestError("invalid_value", "custom_id is empty; give every row its own.")
    return custom_id


def check_defaults(defaults: BatchConfig) -> None:
    """UserError if the configured defaults, which rows inherit, are themselves out of range."""
    for field in ("max_tokens", "temperature", "top_p", "top_k", "seed", "ignore_eos"):
        try:
            CHECKS[field](field, getattr(defaults, field))
        except RequestError as error:
            raise UserError(f"batch.{error.message}") from None
    for field in ("max_row_bytes", "limit"):
        value = getattr(defaults, field)
        if value is not None and value < 1:
            raise UserError(f"batch.{field} is {value} but must be at least 1.")


def show(value: Any) -> str:
    """A value for a message, cut short: rows may hold megabytes."""
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


# --- fields of the body ---


def _params(body: dict, custom_id: str, defaults: BatchConfig) -> SamplingParams:
    chosen = {}
    for field in ("temperature", "top_p", "top_k", "ignore_eos"):
        value = body.get(field)
        chosen[field] = getattr(defaults, field) if value is None else CHECKS[field](field, value)
    seed = body.get("seed")
    seed = derive_seed(defaults.seed, custom_id) if seed is None else CHECKS["seed"]("seed", seed)
    return SamplingParams(max_tokens=_max_tokens(body, defaults), seed=seed, stop=_stop(body.get("stop")), **chosen)


def _max_tokens(body: dict, defaults: BatchConfig) -> int:
    given = [field for field in ("max_tokens", "max_completion_tokens") if body.get(field) is not None]
    if len(given) == 2:
        raise RequestError("invalid_value", "max_tokens and max_completion_tokens are both given; keep one of them.")
    return CHECKS["max_tokens"](given[0], body[given[0]]) if given else defaults.max_tokens


def _stop(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise RequestError("invalid_type", f"stop must be a string or a list of strings, not {show(stop)}.")
    if len(stops) > MAX_STOPS:
        raise RequestError("invalid_value", f"stop lists {len(stops)} strings but at most {MAX_STOPS} are allowed.")
    if not all(0 < len(each) <= MAX_STOP_CHARACTERS for each in stops):
        raise RequestError(
            "invalid_value", f"each stop string must have 1 to {MAX_STOP_CHARACTERS} characters; drop or shorten it."
        )
    return tuple(stops)


def _messages(body: dict) -> Prompt:
    messages = _required(body, "messages", list, "a list of messages")
    if not messages:
        raise RequestError("empty_prompt", "messages is empty; give at least one message.")
    return tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages))


def _message(message: Any, where: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise RequestError("invalid_type", f"{where} must be an object with role and content, not {show(message)}.")
    _no_unknown_fields(message, MESSAGE_FIELDS, where)
    role = message.get("role")
    if role not in ROLES:
        raise RequestError("invalid_value", f"{where}.role is {show(role)} but must be one of {', '.join(ROLES)}.")
    content = message.get("content")
    if isinstance(content, list) and content:
        content = "".join([_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)])
    if not isinstance(content, str):
        raise RequestError(
            "invalid_type", f"{where}.content must be a string or a list of text parts, not {show(content)}."
        )
    return role, content


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise RequestError(
            "unsupported_value", f'{where} must be {{"type": "text", "text": "..."}}; only text is read.'
        )
    _no_unknown_fields(part, PART_FIELDS, where)
    return part["text"]


def _prompt(body: dict) -> Prompt:
    prompt = _required(body, "prompt", (str, list), "a string or a list of token ids")
    if not prompt:
        raise RequestError("empty_prompt", "prompt is empty; give at least one character or token id.")
    if isinstance(prompt, str):
        return prompt
    if any(type(token) is not int for token in prompt):
        raise RequestError("unsupported_value", "a prompt list may hold token ids only; give each text its own row.")
    if min(prompt) < 0:
        raise RequestError("invalid_value", f"prompt holds token id {show(min(prompt))} but ids start at 0.")
    return tuple(prompt)


def _check_unused(body: dict) -> None:
    """Fields that are accepted without effect, or with the one value that is served."""
    if body.get("n") not in (None, 1) or isinstance(body.get("n"), (bool, float)):
        raise RequestError("unsupported_value", f"n is {show(body['n'])} but only 1 is served; repeat the row instead.")
    for field in ("stream", "logprobs"):
        if body.get(field) not in (None, False) or type(body.get(field)) in (int, float):
            raise RequestError(
                "unsupported_value", f"{field} is {show(body[field])} but only false is served; drop it."
            )
    for field, kind, name in (("model", str, "a string"), ("user", str, "a string"), ("metadata", dict, "an object")):
        if body.get(field) is not None and not isinstance(body[field], kind):
            raise RequestError("invalid_type", f"{field} must be {name}, not {show(body[field])}.")


def _no_unknown_fields(given: dict, known: frozenset[str] | set[str], where: str) -> None:
    unknown = given.keys() - known
    if unknown:
        names = ", ".join(show(name) for name in sorted(unknown)[:5])
        raise RequestError(
            "unknown_parameter", f"{where} has {names}, which is not supported here; remove it (known: {_list(known)})."
        )


def _required(given: dict, field: str, kind: type | tuple[type, ...], name: str) -> Any:
    if field not in given:
        raise RequestError("missing_required_parameter", f"{field} is missing; it must be {name}.")
    if not isinstance(given[field], kind):
        raise RequestError("invalid_type", f"{field} must be {name}, not {show(given[field])}.")
    return given[field]


def _list(names: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(names))


# --- one check a number: returns the value or raises with value, bound and remedy ---


def _number(low: float, high: float, bound: str, *, whole: bool, above_low: bool = False) -> Callable[[str, Any], Any]:
    kinds = (int,) if whole else (int, float)

    def check(field: str, value: Any) -> Any:
        if type(value) not in kinds:
            kind = "a whole number" if whole else "a number"
            raise RequestError("invalid_type", f"{field} must be {kind} {bound}, not {show(value)}.")
        if not low <= value <= high or (above_low and value == low):
            raise RequestError("invalid_value", f"{field} is {show(value)} but must be {bound}.")
        return value if whole else float(value)

    return check


def _boolean(field: str, value: Any) -> bool:
    if type(value) is not bool:
        raise RequestError("invalid_type", f"{field} must be true or false, not {show(value)}.")
    return value


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "max_tokens": _number(1, SEED_BOUND, "at least 1", whole=True),
    "temperature": _number(0, 2, "from 0 (greedy) to 2", whole=False),
    "top_p": _number(0, 1, "above 0 and at most 1", whole=False, above_low=True),
    "top_k": _number(0, SEED_BOUND, "0 (off) or more", whole=True),
    "seed": _number(-SEED_BOUND, SEED_BOUND - 1, "from -2**63 to 2**63 - 1", whole=True),
    "ignore_eos": _boolean,
}
