"""Reads a batch file line by line: requests, error rows for what cannot be served, and a hash of the bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.batch.formats import refuse_other_formats
from ds_llmpq.batch.parameters import show
from ds_llmpq.batch.request import Request, RequestError, RowError
from ds_llmpq.batch.request_validation import check_defaults, parse_row, read_custom_id
from ds_llmpq.errors import UserError
from ds_llmpq.files import open_regular

MAX_NESTING = 32  # a valid row needs 6
_NO_JSON = ("invalid_json", "invalid_encoding")
UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RequestFile:
    """A batch file. `total` = requests + errors; `sha256` covers the bytes read (the whole file unless limited)."""

    requests: list[Request]
    errors: list[RowError]
    total: int
    sha256: str


def read_requests(path: str | Path, defaults: BatchConfig) -> RequestFile:
    """Reads a batch file. `defaults` fill in what a row leaves out, bound a row's size, and may limit the rows read.

    A bad row becomes a RowError. `UserError`: a missing, unreadable or empty file, another format (compressed, UTF-16,
    a JSON array, plain text), a repeated custom_id (results are keyed by it), or defaults out of range.
    """
    check_defaults(defaults)
    requests: list[Request] = []
    errors: list[RowError] = []
    seen: set[str] = set()
    strange = 0  # rows that are not objects
    digest = hashlib.sha256()
    try:
        with open_regular(path, "input", "give a batch file as input=FILE") as file:
            refuse_other_formats(file, path)
            for index, (line, raw) in enumerate(_read_rows(file, defaults, digest)):
                custom_id, row = None, {}
                try:
                    row = _decode(raw, defaults.max_row_bytes)
                    custom_id = _check_encodable(read_custom_id(row))
                    if custom_id in seen:
                        raise _repetition_error(custom_id, line, requests, errors, path)
                    seen.add(custom_id)
                    _check_content(raw, row)
                    requests.append(parse_row(row, index, line, defaults))
                except RequestError as error:
                    errors.append(error.row(line, custom_id))
                    strange += (error.code in _NO_JSON and custom_id is None) or not isinstance(row, dict)
    except OSError as error:
        raise UserError(f"cannot read input {path}: {error.strerror}; give a readable file as input=FILE.") from None
    if not requests and not errors:
        raise UserError(f"input {path} has no rows; give a batch file with one JSON object per line.")
    if not requests and strange == len(errors):
        raise UserError(
            f"input {path} is no batch file: no row of {len(errors)} is a JSON object (line {errors[0].line}: "
            f"{errors[0].message.rstrip('.')}); give one JSON object per line."
        )
    return RequestFile(requests, errors, len(requests) + len(errors), digest.hexdigest())


def refuse_unservable(file: RequestFile, path: str | Path) -> None:
    """`UserError` if no row can be served, so that nothing is planned and started for errors alone."""
    if not file.requests:
        first = min(file.errors, key=lambda error: error.line)
        raise UserError(
            f"no row of {path} can be served ({file.total} in all); line {first.line}: {first.message.rstrip('.')}."
        )


def _read_rows(file: BinaryIO, defaults: BatchConfig, digest: Any) -> Iterator[tuple[int, bytes | None]]:
    """(line number, bytes) of every line that is not blank; None for bytes above the size limit."""
    bound = defaults.max_row_bytes + 2  # the line end does not count
    rows = 0
    line = 0
    while rows != defaults.limit:
        raw: bytes | None = file.readline(bound)
        if not raw:
            return
        line += 1
        digest.update(raw)
        if len(raw) == bound and not raw.endswith(b"\n"):
            raw = None
            _skip_line(file, digest)
        elif line == 1:
            raw = raw.removeprefix(UTF8_BOM)
        if raw is None or raw.strip():
            rows += 1
            yield line, raw


def _skip_line(file: BinaryIO, digest: Any) -> None:
    while piece := file.readline(1 << 20):
        digest.update(piece)
        if piece.endswith(b"\n"):
            return


def _decode(raw: bytes | None, max_row_bytes: int) -> Any:
    """The row as Python's decoder takes it, which is more than JSON (`_check_content`)."""
    if raw is None or len(raw.rstrip(b"\r\n")) > max_row_bytes:
        raise RequestError(
            "row_too_large", f"the row is longer than {max_row_bytes} bytes; shorten it or raise batch.max_row_bytes."
        )
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError("invalid_encoding", f"byte {error.start + 1} of the row is not UTF-8; save it so.") from None
    except json.JSONDecodeError as error:
        raise RequestError(
            "invalid_json", f"the row is not JSON: {error.msg} at character {error.pos + 1}; write one object per line."
        ) from None
    except RecursionError:
        raise _nesting_error() from None
    except ValueError:  # a number of thousands of digits
        raise RequestError("invalid_json", "the row holds a number with too many digits; shorten it.") from None


def _check_content(raw: bytes, row: Any) -> None:
    """RequestError for what no row may hold anywhere; the row's custom_id is known by then."""
    # a row with few brackets, like most, cannot be deep
    if raw.count(b"[") + raw.count(b"{") > MAX_NESTING and _is_deeper_than(row, MAX_NESTING):
        raise _nesting_error()
    if b"\\ud" in raw or b"\\uD" in raw:
        _check_encodable(row)
    if b"NaN" in raw or b"Infinity" in raw:  # in a text they are letters
        _STRICT.decode(raw.decode("utf-8"))


def _refuse_constant(name: str) -> None:
    raise RequestError("invalid_json", f"the row holds {name}, which is not JSON; give a finite number.")


_STRICT = json.JSONDecoder(parse_constant=_refuse_constant)


def _nesting_error() -> RequestError:
    return RequestError("nesting_too_deep", f"the row nests deeper than {MAX_NESTING} levels; a valid one needs 6.")


def _is_deeper_than(value: Any, levels: int) -> bool:
    """Whether lists and objects nest deeper than so many levels; without recursion."""
    layer = [value]
    for _ in range(levels + 1):
        containers = [each for each in layer if isinstance(each, (list, dict))]
        if not containers:
            return False
        layer = [each for one in containers for each in (one.values() if isinstance(one, dict) else one)]
    return True


def _check_encodable(value: Any) -> Any:
    """`value` itself, if all its text can be written as UTF-8; RequestError otherwise."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(
            "invalid_encoding", "the row holds half of a surrogate pair (\\ud800-\\udfff); remove it."
        ) from None
    return value


def _repetition_error(
    custom_id: str, line: int, requests: list[Request], errors: list[RowError], path: str | Path
) -> UserError:
    first = min(row.line for row in [*requests, *errors] if row.custom_id == custom_id)
    return UserError(
        f"custom_id {show(custom_id)} stands on line {first} and again on line {line} of {path}; "
        "make it unique, since results are keyed by it."
    )
