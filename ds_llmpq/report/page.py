"""One self-contained HTML page: text, tables and pictures are inside the file, and nothing is fetched."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

_NUMBER = re.compile(r"[+-]?[\d.,]+( %| (B|KiB|MiB|GiB)| \([\d.]+x(, loss [\d.]+)?\))?")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1400px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.6em; margin-bottom: 0; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; }
p { max-width: 1100px; } p.lead { color: #555; } img { max-width: 100%; height: auto; display: block; margin: 1em 0; }
pre { background: #f6f6f4; padding: 0.8em; overflow-x: auto; font-size: 12.5px; line-height: 1.4; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13.5px; display: block; overflow-x: auto; }
th, td { text-align: left; padding: 0.25em 0.8em 0.25em 0; border-bottom: 1px solid #e5e5e5; vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; } td.number { white-space: nowrap; }
nav a { margin-right: 1em; }
"""


@dataclass
class Section:
    """A heading, a sentence on what it shows, then tables, pictures and text in the order added."""

    name: str  # anchor
    title: str
    lead: str
    parts: list[str] = field(default_factory=list)

    def picture(self, file: Path, alternative: str) -> Section:
        data = base64.b64encode(file.read_bytes()).decode()
        self.parts.append(f'<img alt="{escape(alternative)}" src="data:image/png;base64,{data}">')
        return self

    def sentences(self, lines: Sequence[str]) -> Section:
        self.parts += [f"<p>{escape(line)}</p>" for line in lines]
        return self

    def text(self, text: str) -> Section:
        """Columns that spaces align; lines are not wrapped."""
        self.parts.append(f"<pre>{escape(text)}</pre>")
        return self

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Section:
        """A column of numbers alone is aligned at the right."""
        kinds = [_class_of(row[column] for row in rows) for column in range(len(head))]
        columns = "".join(f"<th{kind}>{escape(cell)}</th>" for cell, kind in zip(head, kinds, strict=True))
        lines = [
            "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) for row in rows
        ]
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        self.parts.append(f"<table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>")
        return self


def render_page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole document."""
    links = "".join(f'<a href="#{escape(s.name)}">{escape(s.title)}</a>' for s in sections)
    body = "".join(
        f'<section id="{escape(s.name)}"><h2>{escape(s.title)}</h2><p class="lead">{escape(s.lead)}</p>'
        f"{''.join(s.parts)}</section>"
        for s in sections
    )
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>'
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p><nav>{links}</nav>{body}</body></html>\n'
    )


def _class_of(cells: Iterable[str]) -> str:
    filled = [cell for cell in cells if cell not in ("", "-")]
    return ' class="number"' if filled and all(map(_NUMBER.fullmatch, filled)) else ""
