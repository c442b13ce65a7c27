"""Figures written as PDF and PNG that carry where they come from."""

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path as FilePath
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from hessian.atomic import write_atomically


def save_figure(
    fig: Figure, path_without_suffix: str | FilePath, provenance: Mapping[str, str]
) -> tuple[FilePath, FilePath]:
    """Write a figure as PDF and PNG (200 dpi) that carry where they come from.

    Each file is complete or absent, whatever is killed in between. The same figure gives the same
    PDF, byte for byte, as no date is stored.

    Args:
        fig: The figure.
        path_without_suffix: Where to write; ``.pdf`` and ``.png`` are appended. The folder exists.
        provenance: What to store, e.g. commit, seeds, number of samples: in the PDF as *Subject*
            (to read) and *Keywords* (JSON), in the PNG as text chunks.

    Returns:
        The two paths, PDF first.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    base = FilePath(path_without_suffix)
    subject = "; ".join(f"{key}: {value}" for key, value in provenance.items())
    keywords = json.dumps(dict(provenance), ensure_ascii=False)
    pdf = {"Subject": subject, "Keywords": keywords, "CreationDate": None}
    # TrueType fonts: journals refuse Type 3.
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        return (
            _write(fig, base.parent / f"{base.name}.pdf", "pdf", pdf),
            _write(fig, base.parent / f"{base.name}.png", "png", dict(provenance)),
        )


def _write(fig: Figure, path: FilePath, kind: str, metadata: dict[str, Any]) -> FilePath:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write {path.name} into.")
    drawn = BytesIO()
    fig.savefig(drawn, format=kind, dpi=200, bbox_inches="tight", metadata=metadata)
    return write_atomically(path, drawn.getvalue())
