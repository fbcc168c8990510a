"""The package from Python: plan a model for a cluster, and generate with it.

Every call does what `ds-llmpq run` does: it plans, starts the launcher, restarts the pipeline if it dies, and writes
result rows as they finish. Nothing stays loaded between calls, so give all prompts to one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

from ds_llmpq import config
from ds_llmpq.batch.reader import read_requests
from ds_llmpq.batch.request import CHAT_URL, COMPLETIONS_URL
from ds_llmpq.batch.results import ERRORS_NAME, RESULTS_NAME
from ds_llmpq.cluster.config import ClusterConfig
from ds_llmpq.errors import RunFailed, UserError, quote
from ds_llmpq.files import make_absolute, read_json_lines, write_whole
from ds_llmpq.launch.journal import refuse_run_folder
from ds_llmpq.plan import Plan, write_plan
from ds_llmpq.scheduler.sampling_params import SamplingParams
from ds_llmpq.serving.batch_run import BatchRun, run_batch
from ds_llmpq.serving.config import RunConfig
from ds_llmpq.serving.planning import make_plan
from ds_llmpq.versions import check_versions

PROMPTS_NAME = "prompts.jsonl"

Message: TypeAlias = Mapping[str, Any]  # {"role": "user", "content": "..."}
# a text, its token ids, or a conversation
Prompt: TypeAlias = "str | Sequence[int] | Sequence[Message]"


@dataclass(frozen=True)
class CompletionOutput:
    """An answer. `token_ids`: all generated tokens, including an end token. `finish_reason`: `stop` (an end token or a
    stop string), `length` (max_tokens), or `error` (see RequestOutput.error)."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


@dataclass(frozen=True)
class RequestOutput:
    """The result of one prompt. `outputs` holds one answer; `error` says why there is none if it failed."""

    request_id: str
    prompt: Prompt
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    error: str | None = None


class LLM:
    """A model on a cluster.

    `model`: a folder in Hugging Face format. `cluster`: the name of a shipped cluster, a cluster.yaml (as `ds-llmpq
    detect` writes it), its keys as a dict or ClusterConfig, or None for this machine. `plan`: a Plan or a plan.json to
    use; without one, each call plans for its own prompts. `settings`: any key of `ds-llmpq run`, such as
    `{"planner.theta": 10, "quant.bits": [4, 8]}`. `UserError` says in one sentence what cannot be used.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        cluster: str | os.PathLike[str] | Mapping[str, Any] | ClusterConfig | None = None,
        *,
        plan: Plan | str | os.PathLike[str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        check_versions()
        folder = make_absolute(model)
        if not (folder / "config.json").is_file():
            raise UserError(f"model {folder} is no checkpoint: it has no config.json; give a local folder.")
        own = [f"{key}={_override(value)}" for key, value in (settings or {}).items()]
        composed = config.compose_settings("run", [*_cluster_override(cluster), *own])
        loaded = config.to_object(composed, RunConfig)
        if isinstance(cluster, (Mapping, ClusterConfig)):
            own_cluster = config.parse_cluster(cluster) if isinstance(cluster, Mapping) else cluster
            loaded = replace(loaded, cluster=own_cluster)
        loaded = config.load_cluster(loaded)
        self.settings = replace(loaded, model=replace(loaded.model, path=str(folder)), input=None)
        self._plan = plan

    def plan(
        self, input: str | os.PathLike[str] | None = None, *, out: str | os.PathLike[str] | None = None
    ) -> Plan:  # named as the command's key
        """Plans for the workload in the settings; what they leave open is taken from `input`, a batch file. `out`: a
        folder for plan.json, problem.json and hostfile. `InfeasibleError`: nothing fits; it names a remedy."""
        with _folder(out) as folder:
            refuse_run_folder(folder)
            return make_plan(replace(self.settings, input=None if input is None else str(make_absolute(input))), folder)

    def run(self, input: str | os.PathLike[str], *, out: str | os.PathLike[str]) -> BatchRun:
        """Does what `ds-llmpq run` does: turns a batch file into results.jsonl and errors.jsonl in the folder `out`. A
        second call with the same arguments resumes an interrupted one."""
        folder = make_absolute(out)
        folder.mkdir(parents=True, exist_ok=True)
        return run_batch(self._with_plan(folder, str(make_absolute(input))), folder)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        out: str | os.PathLike[str] | None = None,
    ) -> list[RequestOutput]:
        """Answers in the order of the prompts: one or many, each a text, token ids, or a conversation (a list of
        messages). `sampling_params`: one for all, or one per prompt. `out`: a folder that keeps all files; a second
        call with the same prompts resumes there. `UserError`: an invalid prompt or parameter."""
        listed = [prompts] if _is_one(prompts) else list(prompts)
        if not listed:
            return []
        rows = [_row(index, each, params) for index, (each, params) in enumerate(_pairs(listed, sampling_params))]
        with _folder(out) as folder:
            file = folder / PROMPTS_NAME
            _write_prompts(file, rows)
            if wrong := read_requests(file, self.settings.batch).errors:
                raise UserError(f"prompts[{wrong[0].line - 1}]: {wrong[0].message}")
            run_batch(self._with_plan(folder, str(file)), folder)
            return _outputs(folder, listed)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        out: str | os.PathLike[str] | None = None,
    ) -> list[RequestOutput]:
        """`generate` for one or several conversations, with the model's chat template."""
        return self.generate(messages, sampling_params, out=out)

    def _with_plan(self, folder: Path, input: str) -> RunConfig:
        plan = self._plan
        if isinstance(plan, Plan):
            plan = folder / "given_plan.json"
            write_plan(plan, self._plan)
        return replace(self.settings, input=input, plan=None if plan is None else str(make_absolute(plan)))


def _override(value: Any) -> str:
    """A value as the command line has it."""
    return value if isinstance(value, str) else json.dumps(str(value) if isinstance(value, Path) else value)


def _cluster_override(cluster: Any) -> list[str]:
    if cluster is None or isinstance(cluster, (Mapping, ClusterConfig)):
        return []
    name = os.fspath(cluster)
    is_file = name.endswith((".yaml", ".yml")) or os.sep in name
    return [f"cluster_file={make_absolute(name)}" if is_file else f"cluster={name}"]


@contextlib.contextmanager
def _folder(out: str | os.PathLike[str] | None) -> Iterator[Path]:
    """`out`, or a temporary folder, which is kept if a failed run left results or a log in it."""
    if out is not None:
        folder = make_absolute(out)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    folder = Path(tempfile.mkdtemp(prefix="ds_llmpq-"))
    keep = False
    try:
        yield folder
    except BaseException as error:
        keep = isinstance(error, RunFailed) or (folder / RESULTS_NAME).exists()
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _is_one(prompts: Any) -> bool:
    """A text, token ids, or one conversation."""
    return not isinstance(prompts, Sequence) or isinstance(prompts, str) or _starts_with(prompts, (int, Mapping))


def _starts_with(prompt: Any, kind: type | tuple[type, ...]) -> bool:
    return (
        isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], kind)
    )


def _pairs(prompts: list[Prompt], params: Any) -> Iterator[tuple[Prompt, SamplingParams | None]]:
    if params is None:
        return ((prompt, None) for prompt in prompts)
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise UserError(f"{len(prompts)} prompts have {len(each)} sampling_params; give one, or one per prompt.")
    for one in each:
        if not isinstance(one, SamplingParams):
            raise UserError(f"sampling_params holds {quote(one)}, but must hold SamplingParams(...) alone.")
    return zip(prompts, each, strict=True)


def _row(index: int, prompt: Any, params: SamplingParams | None) -> dict[str, Any]:
    """A row of a batch file with the values in `params`; the settings apply to those that are None."""
    is_chat = _starts_with(prompt, Mapping)
    values = {} if params is None else {each.name: getattr(params, each.name) for each in fields(params)}
    body = {name: value for name, value in values.items() if value is not None}
    body["return_token_ids"] = True
    if stop := body.pop("stop", ()):
        body["stop"] = [stop] if isinstance(stop, str) else list(stop)
    body |= {"messages": [dict(each) for each in prompt]} if is_chat else {"prompt": prompt}
    url = CHAT_URL if is_chat else COMPLETIONS_URL
    return {"custom_id": str(index), "method": "POST", "url": url, "body": body}


def _write_prompts(file: Path, rows: list[dict[str, Any]]) -> None:
    try:
        text = "".join(json.dumps(row, default=list) + "\n" for row in rows)
    except (TypeError, ValueError) as error:
        raise UserError(f"a prompt cannot be written as JSON ({error}); give texts, token ids or messages.") from None
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise UserError(f"{file} holds other prompts; give another folder as out, or the same prompts again.")
    write_whole(file, text)


def _outputs(folder: Path, prompts: list[Prompt]) -> list[RequestOutput]:
    """The rows in both files of a finished run, in the order of the prompts."""
    rows, remedy = {}, "generate into another folder"
    try:
        for name in (ERRORS_NAME, RESULTS_NAME):
            for _, row in read_json_lines(folder / name, "results", remedy):
                rows[int(row["custom_id"])] = row
        return [_output(rows[index], prompt) for index, prompt in enumerate(prompts)]
    except (LookupError, TypeError, ValueError) as error:  # the files were changed
        raise UserError(f"{folder} holds results of another form ({type(error).__name__}); {remedy}.") from None


def _output(row: dict[str, Any], prompt: Prompt) -> RequestOutput:
    if row["response"] is None:
        failed = CompletionOutput(0, "", (), "error")
        return RequestOutput(row["custom_id"], prompt, (), (failed,), row["error"]["message"])
    choice = row["response"]["body"]["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    answer = CompletionOutput(0, text, tuple(choice["token_ids"]), choice["finish_reason"])
    return RequestOutput(row["custom_id"], prompt, tuple(choice["prompt_token_ids"]), (answer,))
