"""Sphinx configuration: MyST pages, executed notebooks as they are committed, furo."""

import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import flatvalley  # noqa: E402

project = "flatvalley"
author = "The flatvalley developers"
project_copyright = author
release = version = flatvalley.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
# myst_nb writes the notebooks' pictures beside the build folder, into jupyter_execute.
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"flatvalley {release}"

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
# The notebooks come executed; the test run executes their sources.
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def copy_notebooks() -> None:
    """Make docs/_notebooks equal to the executed notebooks; a checkout may have none yet."""
    target = HERE / "_notebooks"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    sources = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    for source in sources:
        shutil.copy2(source, target)
    # A page of its own, because a toctree with a pattern that matches nothing is a warning.
    lines = ["# Notebooks", "", "One question each, with its answer asserted at the end.", ""]
    lines += ["```{toctree}", ":maxdepth: 1", "", *[source.stem for source in sources], "```"]
    (target / "index.md").write_text("\n".join(lines if sources else lines[:3]) + "\n")


copy_notebooks()


COLON = "\ue000"


def hide_colon(app, what, name, obj, options, lines):
    """Keep the first sentence of an attribute: napoleon would read "type: description"."""
    if what in ("attribute", "property", "data") and lines:
        lines[0] = lines[0].replace(":", COLON)


def restore(app, what, name, obj, options, lines):
    """Bring the colon back, and keep |x| a norm: to reStructuredText it is a substitution."""
    in_doctest = False
    for i, line in enumerate(lines):
        in_doctest = line.lstrip().startswith(">>>") or (in_doctest and line.strip() != "")
        if not in_doctest:
            parts = re.split(r"(``.*?``)", line)
            parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
            lines[i] = "".join(parts).replace(COLON, ":")


def setup(app):
    # Napoleon works on docstrings in between, at Sphinx's default priority of 500.
    app.connect("autodoc-process-docstring", hide_colon, priority=100)
    app.connect("autodoc-process-docstring", restore, priority=900)
