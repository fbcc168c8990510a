"""Damaged and hostile variants of valid files: of their bytes, of the JSON in them, of lines, of overrides."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from typing import Any

ODD_VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, -(10**400), 0.5, -0.0, 1e308, 1e-320, float("nan"),
    float("inf"), float("-inf"), "", " ", "a", "0", "-1", "nan", "1e999", "../../etc/passwd", "/etc/passwd", "..", ".",
    "a/b", "\0", "\ud800", "é\u2028\x85", "-oProxyCommand=touch pwned", "$(touch pwned)", "`id`", "${oc.env:HOME}",
    "x" * 100_000, [], {}, [[]], [None], {"": None}, ["a", 1], [1e400],
)  # fmt: skip
_PIECES = (
    b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b"\r\n", b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"NaN",
    b"Infinity", b"-", b"1e999", b"null", b"\xed\xa0\x80", b"\xc2\x85", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000,
    b"=", b"slots=", b"#", b"..", b"/", b"\t",
)  # fmt: skip


def odd_value(rng: random.Random) -> Any:
    """A value that a key is seldom meant to have; sometimes deep or long."""
    kind = rng.randrange(20)
    if kind == 0:
        return nested(rng.choice([5, 40, 2000]))
    if kind == 1:
        return [rng.choice(ODD_VALUES) for _ in range(rng.randrange(5))]
    if kind == 2:
        return rng.randrange(-5, 5)
    if kind == 3:
        return rng.uniform(-10, 10) * 10.0 ** rng.randrange(-300, 300)
    return rng.choice(ODD_VALUES)


def nested(depth: int) -> Any:
    value: Any = 0
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def mutated_json(rng: random.Random, value: Any) -> Any:
    """A copy with a few places replaced, removed, doubled, exchanged or added."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(_places(value))
        if not places:
            return odd_value(rng)
        holder, key = rng.choice(places)
        action = rng.randrange(6)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[str(rng.choice(["x", "", "schema", "bits", "../x", 3]))] = odd_value(rng)
        elif action == 1:
            holder.insert(key, odd_value(rng))
        elif action == 2:
            other, there = rng.choice(places)
            holder[key], other[there] = other[there], holder[key]
        elif action == 3 and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
            holder[key] = rng.choice([-holder[key], holder[key] * 1000, 0.5, repr(min(holder[key], 10**300))])
        else:
            holder[key] = odd_value(rng)
    return value


def _places(value: Any, depth: int = 0):
    if depth > 12:
        return
    if isinstance(value, dict):
        for key in value:
            yield value, key
            yield from _places(value[key], depth + 1)
    elif isinstance(value, list):
        for index in range(min(len(value), 8)):
            yield value, index
            yield from _places(value[index], depth + 1)


def json_bytes(value: Any) -> bytes:
    """With what JSON does not allow but Python writes: NaN, Infinity and lone surrogates as escapes."""
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return b"[" * 5000 + b"]" * 5000


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """A copy with bytes flipped, cut, doubled or put in."""
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        place = rng.randrange(len(data) + 1)
        action = rng.randrange(6)
        if action == 0:
            data = data[:place]
        elif action == 1 and place < len(data):
            data = data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
        elif action == 2:
            data = data[:place] + rng.choice(_PIECES) + data[place:]
        elif action == 3:
            data = data[:place] + data[place + rng.randrange(1, 50) :]
        elif action == 4:
            start = rng.randrange(len(data) + 1)
            data = data[:place] + data[start : start + rng.randrange(200)] + data[place:]
        else:
            data = data[:place] + bytes(rng.randrange(256) for _ in range(rng.randrange(9))) + data[place:]
    return data


def mutated_document(rng: random.Random, data: bytes) -> bytes:
    """A JSON file: mostly well formed with odd values, sometimes broken as text."""
    if rng.random() < 0.75:
        data = json_bytes(mutated_json(rng, json.loads(data)))
    if rng.random() < 0.3:
        data = mutated_bytes(rng, data)
    return data


def mutated_lines(rng: random.Random, data: bytes) -> bytes:
    """A file of JSON lines: each line's value changed, lines doubled, joined, dropped, exchanged or broken."""
    lines = data.splitlines()
    for _ in range(rng.choice([1, 2, 4])):
        if not lines:
            break
        place = rng.randrange(len(lines))
        action = rng.randrange(6)
        if action <= 2:
            try:
                lines[place] = json_bytes(mutated_json(rng, json.loads(lines[place])))
            except (ValueError, RecursionError):
                lines[place] = b"{}"
        elif action == 3:
            lines.insert(place, lines[rng.randrange(len(lines))])
        elif action == 4:
            del lines[place]
        else:
            lines[place] = mutated_bytes(rng, lines[place])
    end = rng.choice([b"\n", b"\n", b"\r\n", b"", b"\n\n"])
    return end.join([*lines, b""])


def mutated_overrides(rng: random.Random, known: list[str]) -> list[str]:
    """Overrides as a user may mistype them, from known `key=value` ones."""
    found = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        key, _, value = rng.choice(known).partition("=")
        action = rng.randrange(6)
        if action == 0:
            key = mutated_bytes(rng, key.encode()).decode(errors="ignore")
        elif action == 1:
            value = mutated_bytes(rng, value.encode()).decode(errors="ignore")
        elif action == 2:
            value = json_bytes(odd_value(rng)).decode()[:2000]
        elif action == 3:
            key = rng.choice(["+", "++", "~", ""]) + key + rng.choice(["", ".x", "[0]", "@y"])
        elif action == 4:
            value = rng.choice(["{a:1}", "[1,2,3]", "[[1]]", "{}", "'", '"', "\\", "null", "???", "${x}", "${gib:a}",
                                "${asset:../x}", "${oc.env:HOME}", "1,2", "range(1,5)", "choice(a,b)"])  # fmt: skip
        found.append(rng.choice([f"{key}={value}", f"{key}={value}", key, f"{key} = {value}"]))
    return [text.replace("\0", "") for text in found]


# --- every place with every odd value ---

_RAW = "@@RAW@@"
# as text: Python cannot write all of them
ODD_TEXTS = (
    "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1" + "0" * 400, "-1" + "0" * 400, "1e308", "1e-320", "-1", "0",
    "0.5", str(2**31), str(2**63), str(2**64), "1" * 5000, "null", "true", "false", '""', '"\\ud800"', '"a\\u0000b"',
    '"\\u001b[31m\\n<script>alert(1)</script>"', '"../../../etc/passwd"', '"-oProxyCommand=x"', '"a b;$(id)`id`"',
    '"' + "9" * 400 + '"', '"\u2028\u202e"', "[]", "{}", "[null]", "[[]]", '{"":{}}', '[1,"a"]', "[-1]", "[NaN]",
    "[" * 200 + "]" * 200, '"' + "x" * 70_000 + '"',
)  # fmt: skip
ODD_CELLS = (
    "", "NaN", "inf", "-inf", "1e400", "1" + "0" * 400, "9" * 5000, "-1", "0", "0.5", "1_0", "0x10", str(2**31),
    str(2**63), str(2**64), "true", "null", "x", "\0", "\x1b[31m", "\u2028\u202e", "=1+1", '"', '"a', "a,b", "\xe9",
    "../../etc/passwd", "x" * 140_000, "1e308", "1e-320", "1e30",
)  # fmt: skip


def exhaustive_json(data: bytes, most_entries: int = 3) -> Iterator[bytes]:
    """A JSON document with each place in turn replaced by each odd value, left out, or named twice; of lists the first
    entries stand for all."""
    document = json.loads(data)
    for path in _paths(document, most_entries):
        *above, key = path
        for kind in ("odd", "gone", "twice"):
            changed = json.loads(data)
            holder = changed
            for step in above:
                holder = holder[step]
            if kind == "gone":
                del holder[key]
                yield json.dumps(changed).encode()
                continue
            holder[key] = _RAW
            text = json.dumps(changed)
            if kind == "odd":
                yield from (text.replace(f'"{_RAW}"', odd).encode() for odd in ODD_TEXTS)
            elif isinstance(key, str):
                yield text.replace(f'"{_RAW}"', f"1, {json.dumps(key)}: {{}}").encode()


def exhaustive_lines(data: bytes, most_lines: int = 3) -> Iterator[bytes]:
    """JSON lines with one line changed as in `exhaustive_json`."""
    lines = data.splitlines()
    for place in range(min(len(lines), most_lines)):
        for changed in exhaustive_json(lines[place]):
            yield b"\n".join([*lines[:place], changed, *lines[place + 1 :], b""])


def exhaustive_table(data: bytes, most_lines: int = 4) -> Iterator[bytes]:
    """A CSV file with each cell of its first lines replaced by each odd one, and with a cell or column too few or many;
    a first line that is a comment holds JSON."""
    lines = data.decode().split("\n")
    first = 0
    if lines[0].startswith("# "):
        first, rest = 1, "\n".join(lines[1:])
        for header in exhaustive_json(lines[0][2:].encode()):
            yield b"# " + header + b"\n" + rest.encode()
    for place in range(first, min(len(lines), first + most_lines)):
        cells = lines[place].split(",")
        for column in range(len(cells)):
            for odd in (*ODD_CELLS, f"{cells[column]},1", None):
                row = [*cells[:column], *([] if odd is None else [odd]), *cells[column + 1 :]]
                yield "\n".join([*lines[:place], ",".join(row), *lines[place + 1 :]]).encode()


def special_files(data: bytes) -> Iterator[bytes]:
    """What any file can be instead of itself: empty, of another encoding, cut, doubled, deep, endless, hostile."""
    text = data.decode(errors="replace")
    levels = [b"a: &a [x,x,x,x,x,x,x,x,x]\n"]
    levels += [b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9)]
    yield from (
        b"",
        b" \n\n",
        b"\xef\xbb\xbf" + data,
        text.encode("utf-16"),
        text.encode("utf-32"),
        gzip.compress(data),
    )
    yield from (gzip.compress(data), b"".join(levels))
    yield from (data + b"\xe9\xff", b"\0" * 1000, data + b"\0" * 100, data[: len(data) // 2], data[:-2], data + data)
    yield from (data.replace(b"\n", b"\r\n"), data.replace(b"\n", b"\r"), b"[" * 10_000 + b"]" * 10_000)
    yield from (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, b"1", b"null", b'"x"', b"[]", b"{}", b"NaN", b"1" * 100_000)
    yield from (
        b"<html><script>alert(1)</script></html>",
        b'!!python/object/apply:os.system ["true"]',
        b"".join(levels),
    )
    yield b"\x1b]0;x\x07\x1b[2J" + data


def _paths(value: Any, most_entries: int, path: tuple = ()) -> Iterator[tuple]:
    keys = value if isinstance(value, dict) else range(min(len(value), most_entries)) if isinstance(value, list) else ()
    for key in keys:
        yield (*path, key)
        yield from _paths(value[key], most_entries, (*path, key))
