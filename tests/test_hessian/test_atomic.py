"""Files that appear whole or not at all."""

import threading
import time

import pytest

from hessian.atomic import write_atomically


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "f", b"old")
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


def test_what_a_killed_writer_left_is_taken_over_by_the_next(tmp_path):
    path = write_atomically(tmp_path / "f", b"old")
    (tmp_path / ".f.partial").write_bytes(b"a much longer text")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["f"]


def test_writers_of_one_file_take_turns(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "f", b"0" * 100)
    monkeypatch.setattr("os.fsync", lambda handle: time.sleep(1e-4))  # time to be disturbed

    def write(digit):
        for _ in range(50):
            write_atomically(path, digit * 100)

    writers = [threading.Thread(target=write, args=(b"%d" % i,)) for i in range(4)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(path.read_bytes())
    assert seen <= {b"%d" % i * 100 for i in range(4)}
    assert len(seen) > 1
    assert names(tmp_path) == ["f"]
