"""``python -m flatvalley``, as ``torchrun -m flatvalley`` needs it."""

from flatvalley.cli import main

main()
