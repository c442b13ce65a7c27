"""Every Python snippet of the README and the documentation runs, page by page, top to bottom."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("[!_]*/*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Run by test_how_to_training.py, which also looks at what they have trained.
ELSEWHERE = ("train_with_grda", "train_with_grda_in_a_framework")
WITH_SNIPPETS = [
    page for page in PAGES if BLOCK.search(page.read_text()) and page.stem not in ELSEWHERE
]


@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=lambda page: page.stem)
def test_snippets_run(page, tmp_path):
    code = "import torch\ntorch.set_num_threads(1)\n" + "\n".join(BLOCK.findall(page.read_text()))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


def test_readme_has_a_snippet():
    assert ROOT / "README.md" in WITH_SNIPPETS
