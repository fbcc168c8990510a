"""Encodes prompts, and checks that each fits the model's context and the plan's KV cache."""

from __future__ import annotations

from array import array
from collections import abc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ds_llmpq.batch.request import Request, RequestError, RowError
from ds_llmpq.errors import first_line
from ds_llmpq.scheduler.request_group import Sequence

CHUNK_REQUESTS = 256  # texts per call of the tokenizer: fast tokenizers encode them in parallel


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request ready to run. `max_tokens` is the request's own limit, or less if the context ends sooner."""

    request: Request
    prompt_ids: array  # int32: a tenth of a list's memory
    max_tokens: int

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def sequence_tokens(self) -> int:
        """KV positions it may need: prompt and all generated tokens."""
        return len(self.prompt_ids) + self.max_tokens

    def sequence(self, key: int, generated: abc.Sequence[int] = ()) -> Sequence:
        """The sequence for the engine under the driver's `key`; `generated`: its tokens so far."""
        prompt = tuple(self.prompt_ids)
        return Sequence(key, prompt, self.max_tokens, self.request.params, tuple(generated))


def prepare(
    requests: Iterable[Request],
    tokenizer: Any,
    *,
    context_tokens: int,
    capacity_tokens: int | None = None,
    vocabulary_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[PreparedRequest], list[RowError]]:
    """Encodes all requests, in order; those that cannot run become error rows.

    `context_tokens`: positions of the model. `capacity_tokens`: KV positions that the plan reserves for a sequence
    (prompt and generated; None: the context). `vocabulary_size`: rows of the model's embedding (None: the tokenizer's).
    `progress` is called with the number of requests done since the last call.
    """
    if vocabulary_size is None:
        vocabulary_size = len(tokenizer)
    prepared: list[PreparedRequest] = []
    errors: list[RowError] = []
    rows = iter(requests)
    while chunk := list(islice(rows, CHUNK_REQUESTS)):
        for request, ids in encode_all(chunk, tokenizer):
            try:
                if isinstance(ids, RequestError):
                    raise ids
                _check_ids(ids, vocabulary_size)
                max_tokens = limit_max_tokens(request, len(ids), context_tokens, capacity_tokens)
                prepared.append(PreparedRequest(request, array("i", ids), max_tokens))
            except RequestError as error:
                errors.append(error.row(request.line, request.custom_id))
        if progress is not None:
            progress(len(chunk))
    return prepared, errors


def encode_all(requests: list[Request], tokenizer: Any) -> Iterator[tuple[Request, list[int] | RequestError]]:
    """Each request with its token ids or the reason for having none; texts are encoded together.

    Chat: the tokenizer's template with a generation prompt, which includes special tokens. Completions: the text with
    the tokenizer's default special tokens, or the given token ids.
    """
    outcomes: dict[int, list[int] | RequestError] = {}
    texts: dict[bool, dict[int, str]] = {True: {}, False: {}}
    for place, request in enumerate(requests):
        if isinstance(request.prompt, str):
            texts[False][place] = request.prompt
        elif not request.is_chat:
            outcomes[place] = list(request.prompt)
        else:
            try:
                texts[True][place] = render_chat(request, tokenizer)
            except RequestError as error:
                outcomes[place] = error
    for is_chat, by_place in texts.items():
        outcomes.update(zip(by_place, _tokenize(list(by_place.values()), tokenizer, not is_chat), strict=True))
    for place, request in enumerate(requests):
        ids = outcomes[place]
        yield request, ids or RequestError("empty_prompt", "the prompt gives no tokens; give some text.")


def render_chat(request: Request, tokenizer: Any) -> str:
    """The conversation in the model's chat template, up to the start of the assistant's answer."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise RequestError(
            "template_error", "the model has no chat template; send the text to /v1/completions as prompt instead."
        )
    messages = [{"role": role, "content": content} for role, content in request.prompt]
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program from the checkpoint and may raise anything
        missing = _find_missing_tokens(tokenizer)
        remedy = f"set {missing} in tokenizer_config.json" if missing else "change their roles"
        raise RequestError(
            "template_error", f"the model's chat template refuses these messages ({first_line(error)}); {remedy}."
        ) from None


def _find_missing_tokens(tokenizer: Any) -> str:
    """Special tokens that the chat template uses but the tokenizer lacks, so that it fails for every row."""
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    return " and ".join(name for name in names if name in template and getattr(tokenizer, name, None) is None)


def limit_max_tokens(
    request: Request, prompt_tokens: int, context_tokens: int, capacity_tokens: int | None = None
) -> int:
    """Tokens that this request may generate: its max_tokens, or fewer if the context ends sooner.

    RequestError: `context_length_exceeded` if the prompt leaves no room for a token; `capacity_exceeded` if the plan
    reserves less than the request asks for. The plan never shortens an answer, because the text of a row must not
    depend on the plan.
    """
    if prompt_tokens >= context_tokens:
        raise RequestError(
            "context_length_exceeded",
            f"the prompt has {prompt_tokens} tokens but the model's context is {context_tokens}; "
            f"shorten it to at most {context_tokens - 1}.",
        )
    max_tokens = min(request.params.max_tokens, context_tokens - prompt_tokens)
    if capacity_tokens is not None and prompt_tokens + max_tokens > capacity_tokens:
        raise RequestError(
            "capacity_exceeded",
            f"{prompt_tokens} prompt tokens and max_tokens {max_tokens} exceed the {capacity_tokens} tokens the plan "
            "reserves for a sequence; plan with larger workload.prompt_tokens or workload.generated_tokens.",
        )
    return max_tokens


def _tokenize(texts: list[str], tokenizer: Any, add_special_tokens: bool) -> list[list[int] | RequestError]:
    """Token ids of each text, with the tokenizer's default special tokens or none."""
    if not texts:
        return []
    options: dict[str, Any] = {"return_attention_mask": False, "verbose": False}
    if not add_special_tokens:
        options["add_special_tokens"] = False
    try:
        return list(tokenizer(texts, **options)["input_ids"])
    except Exception as error:  # a text that cannot be tokenized must not fail others
        if len(texts) == 1:
            why = first_line(error)
            return [RequestError("tokenization_error", f"the tokenizer refuses the prompt ({why}); change it.")]
        return [_tokenize([text], tokenizer, add_special_tokens)[0] for text in texts]


def _check_ids(ids: list[int], vocabulary_size: int) -> None:
    if max(ids) >= vocabulary_size:
        raise RequestError(
            "invalid_value", f"the prompt holds token id {max(ids)} but the model's ids end at {vocabulary_size - 1}."
        )
