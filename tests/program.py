"""The program as tests call it, and the tables that it writes."""

import contextlib
import csv
import io
import sys

from flatvalley.cli import main


def flatvalley(*arguments):
    """Run the program in this process; exit status, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["flatvalley", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        return end.code or 0, out.getvalue(), err.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("main must end with an exit status")


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))
