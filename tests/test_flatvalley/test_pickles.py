import collections
import contextlib
import os
import pickle
import struct
import sys

import numpy as np
import pytest

from flatvalley.data.pickles import read_plain_pickle
from hessian import DamagedFileError

ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 12) + 240
TABLE = {b"data": ARRAY, b"labels": [3, 300, 70_000, -1], b"batch_label": b"one \xff", b"no": b""}


def string(text: bytes) -> bytes:
    """A string as cPickle of Python 2 writes it."""
    if len(text) < 256:
        return b"U" + bytes([len(text)]) + text
    return b"T" + struct.pack("<i", len(text)) + text


def python_2_pickle(array: np.ndarray, labels: list[int], *, by_columns: bool = False) -> bytes:
    """The instructions that cPickle of Python 2 writes for a batch, by hand."""
    shape = b"".join(b"M" + struct.pack("<H", size) for size in array.shape)
    order = b"\x88" if by_columns else b"\x89"
    values = array.tobytes(order="F" if by_columns else "C")
    kind = (
        b"cnumpy\ndtype\nq\x06" + string(b"u1") + b"K\x00K\x01\x87Rq\x07"
        b"(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    return (
        b"\x80\x02}q\x01("
        + string(b"data")
        + b"cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85"
        + string(b"b")
        + b"\x87Rq\x04(K\x01"
        + shape
        + b"\x86"
        + kind
        + order
        + string(values)
        + b"tbr\x08\x01\x00\x00"
        + string(b"labels")
        + b"]q\x09("
        + b"".join(b"J" + struct.pack("<i", label) for label in labels)
        + b"e"
        + string(b"first")
        + b"j\x08\x01\x00\x00"
        + b"u."
    )


@pytest.fixture
def file(tmp_path):
    return tmp_path / "batch"


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("columns", [12, 3072])
def test_what_python_2_wrote_is_read(file, columns, by_columns):
    array = np.arange(2 * columns).astype(np.uint8).reshape(2, columns)
    content = python_2_pickle(array, [7, -2], by_columns=by_columns)
    # The hand-written instructions mean what we think: the unpickler agrees.
    assert np.array_equal(pickle.loads(content, encoding="bytes")[b"data"], array)
    file.write_bytes(content)
    found = read_plain_pickle(file)
    assert list(found) == [b"data", b"labels", b"first"]
    assert np.array_equal(found[b"data"], array)
    assert np.array_equal(found[b"first"], array)
    assert found[b"labels"] == [7, -2]


def test_what_python_3_writes_is_read(file):
    table = TABLE | {"text é": "text ä", "pair": (1, 2, 3, 4), "long": 2**40, "none": None}
    file.write_bytes(pickle.dumps(table, protocol=2))
    found = read_plain_pickle(file)
    assert np.array_equal(found.pop(b"data"), table.pop(b"data"))
    assert found == table


class Harmful:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Harmful(os.system, ("exit 1",)), 2), "names (posix|nt) system, which could"),
        (pickle.dumps({"data": Harmful(eval, ("1",))}, 2), "names __builtin__ eval"),
        (pickle.dumps([Harmful(exec, ("1",))], 2), "names __builtin__ exec"),
        (b"\x80\x02cos\nsystem\nU\x04true\x85R.", "names os system"),
        (b"\x80\x02(cos\nsystem\nU\x04trueo.", "names os system"),
        (b"\x80\x02(U\x04trueios\nsystem\n.", "the instruction INST"),
        (b"\x80\x02U\x02osU\x06system\x93.", "the instruction STACK_GLOBAL"),
        (b"\x80\x02\x82\x01.", "the instruction EXT1"),
        (b"\x80\x02U\x01xQ.", "the instruction BINPERSID"),
        (pickle.dumps(collections.OrderedDict(a=1), 2), "names collections OrderedDict"),
        (pickle.dumps(np.zeros(3), 2), r"calls numpy dtype with \('f8'"),
        (pickle.dumps(np.array([None, print], dtype=object), 2), "which could|calls numpy dtype"),
        (pickle.dumps({1}, 2), "names __builtin__ set"),
        (pickle.dumps(1.5, 2), "the instruction BINFLOAT"),
        (pickle.dumps(TABLE, 4), "it is of protocol 4"),
        (b"\x80\x02cnumpy\nndarray\nK\x01\x85R.", "calls numpy ndarray with"),
        (b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0rot\x86R.", "calls _codecs encode"),
        (b"\x80\x02cnumpy\nndarray\n.", "holds an object that is no data"),
        (b"\x80\x02]}b.", "sets the state of list"),
    ],
)
def test_everything_else_is_refused_by_name_and_not_run(file, content, message, monkeypatch):
    def forbidden(*_: object) -> None:
        raise AssertionError("something was imported or run")

    file.write_bytes(content)
    monkeypatch.setattr(os, "system", forbidden)
    with pytest.raises(DamagedFileError, match=message):
        read_plain_pickle(file)


def test_nothing_is_imported(file, tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    file.write_bytes(b"\x80\x02ctrap\nfunction\n)R.")
    before = set(sys.modules)
    with pytest.raises(DamagedFileError, match="names trap function"):
        read_plain_pickle(file)
    assert set(sys.modules) == before


def test_a_file_cut_anywhere_is_damaged_and_never_half_read(file):
    content = python_2_pickle(ARRAY, [1, 2])
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(DamagedFileError, match="is no pickle, or cut short"):
            read_plain_pickle(file)


def test_a_changed_byte_gives_data_or_a_damaged_file(file):
    content = python_2_pickle(ARRAY, [1, 2])
    for place in range(len(content)):
        for change in (0x01, 0x80, 0xFF):
            changed = bytearray(content)
            changed[place] ^= change
            file.write_bytes(changed)
            # Nothing but the one error may come out, whatever the file says.
            with contextlib.suppress(DamagedFileError):
                read_plain_pickle(file)


def test_an_array_of_another_size_than_its_bytes_is_damaged(file):
    content = pickle.dumps(ARRAY, 2)
    file.write_bytes(content.replace(b"K\x02K\x0c\x86", b"K\x02K\x0d\x86"))
    with pytest.raises(DamagedFileError, match=r"24 bytes for an array of shape \(2, 13\)"):
        read_plain_pickle(file)
