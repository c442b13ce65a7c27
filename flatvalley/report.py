"""A report: one self-contained HTML page that asks nothing of the network."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from flatvalley.run import write_atomically


@dataclass(frozen=True)
class TableRow:
    """Cells of a row as text; ``kind`` is ``"group"`` for a first row, ``"control"`` or empty."""

    cells: Sequence[str]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table with the sentence that says how to read it."""

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[TableRow]
    prose: bool = False
    """Whether cells are sentences, which are set flush left and broken."""


@dataclass(frozen=True)
class Picture:
    """A figure's file, and the words under it."""

    name: str
    title: str
    caption: str
    png: Path


@dataclass(frozen=True)
class Report:
    """What a report says, conclusion first."""

    title: str
    byline: str
    verdict: str
    good: bool
    conclusion: Sequence[str]
    claims: Sequence[Any]
    """Objects with ``statement``, ``evidence`` and ``holds``."""
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    methods: Sequence[str]
    provenance: Sequence[tuple[str, str]]


def write_report(report: Report, path: Path) -> Path:
    """Write the report as one HTML file with its pictures inside, whole or not at all."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("flatvalley").joinpath("templates", "report.html.j2").read_text("utf-8")
    figures = [
        {
            "name": picture.name,
            "title": picture.title,
            "caption": picture.caption,
            "data": base64.b64encode(picture.png.read_bytes()).decode("ascii"),
        }
        for picture in report.pictures
    ]
    html = environment.from_string(source).render(**vars(report), figures=figures)
    return write_atomically(path, html.encode())
