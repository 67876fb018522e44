"""Files made by somebody who wants to run code, to fill the memory or to take for ever."""

from __future__ import annotations

import functools
import io
import struct
import zipfile
import zlib

import numpy as np

_BLOCK = 1 << 24


@functools.cache
def deflated_zeros(size: int) -> bytes:
    """Return a raw deflate stream of `size` zeros (rounded up to 16 MiB), a thousandth of that."""
    stream = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = stream.compress(bytes(_BLOCK)) + stream.flush(zlib.Z_FULL_FLUSH)
    return block * -(-size // _BLOCK) + stream.flush()


def gzip_bomb(size: int) -> bytes:
    """Return a .gz file of so many zeros; its check sum is wrong, which shows only at the end."""
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + deflated_zeros(size) + bytes(8)


def zip_file(name: str, compressed: bytes, size: int, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a .zip file of one member that claims to unpack to `size` bytes."""
    size = min(size, 2**32 - 2)
    encoded = name.encode()
    fields = struct.pack("<HHHHHIIIHH", 20, 0, method, 0, 33, 0, len(compressed), size, len(encoded), 0)
    local = b"PK\x03\x04" + fields + encoded + compressed
    directory = b"PK\x01\x02" + struct.pack("<H", 20) + fields + bytes(14) + encoded
    return local + directory + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(directory), len(local), 0)


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """Return a .npy file with this header."""
    encoded = header.encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(encoded)) + encoded + data


def zip_of(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """Return a .zip file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


HEADERS = (
    "{'descr': '<f4', 'fortran_order': False, 'shape': (100000000000,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (500000000,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (18446744073709551616, 0), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1, " * 70 + "), }",
    "{'descr': '|V0', 'fortran_order': False, 'shape': (1000000000,), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    "{'descr': '<U1000000', 'fortran_order': False, 'shape': (1000000,), }",
    "{'descr': [('a', '<f4'), ('b', '|O')], 'fortran_order': False, 'shape': (3,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': " + "(" * 150 + ")" * 150 + ", }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': " + "-" * 9000 + "3, }",
    "__import__('os').abort()",
)


def npz_bombs(name: str) -> list[bytes]:
    """Return .npz files with a member `name` that is huge or claims to be."""
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (375000000,), }"
    start = npy(header + " " * (118 - len(header)))
    stream = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    compressed = stream.compress(start) + stream.flush(zlib.Z_FULL_FLUSH) + deflated_zeros(3 << 29)
    member = f"{name}.npy"
    return [
        zip_file(member, compressed, 128 + 1_500_000_000),
        zip_file(member, compressed, 2**32 - 2),
        zip_file(member, compressed, 140),
        *(zip_of({member: npy(text, bytes(64))}) for text in HEADERS),
        zip_of({member: npy(HEADERS[0], b"", b"\x09\x00")}),
        zip_of({member: _pickled_npy()}),
        zip_of({"../../../tmp/x.npy": npy(HEADERS[2])}),
    ]


def _pickled_npy() -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.array([{"a": 1}], object), allow_pickle=True)
    return file.getvalue()


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _call(module: str, name: str, arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + arguments + b"tR"


_ABORT = _call("os", "abort", b"")
_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
_UINT8 = b"cnumpy\ndtype\n(X\x02\x00\x00\x00u1K\x00K\x01tR(K\x03X\x01\x00\x00\x00|NNN"
_UINT8 += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"

# Opcodes with which a pickle runs something, or makes Python or NumPy take much memory or time.
PICKLES = (
    b"\x80\x02}(" + _text("data") + _ABORT + b"u.",
    _ABORT + b".",
    b"cbuiltins\neval\n(" + _text("__import__('os').abort()") + b"tR.",
    b"cbuiltins\ngetattr\n(cnumpy\nndarray\n" + _text("tofile") + b"tR.",
    b"\x80\x04" + b"\x8c\x02os\x8c\x05abort\x93)R.",
    b"\x80\x04" + b"\x8c\x05numpy\x8c\x13ndarray.__subclasses\x93)R.",
    b"(i" + b"os\nabort\n.",
    b"(cos\nabort\no.",
    b"cos\nabort\n)\x81.",
    b"}r\xff\xff\xff\x7f.",  # a place in the memo so far out that C's array of places is 32 GB
    b"}p2000000000\n.",
    b"]r\xff\xff\xff\x0fr\xff\xff\xff\x1f.",
    b"\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
    b"\x8e" + struct.pack("<Q", 2_000_000_000) + b"x.",
    b"\x96" + struct.pack("<Q", 2_000_000_000) + b"x.",
    b"\x8d" + struct.pack("<Q", 2_000_000_000) + b"x.",
    b"\x95" + struct.pack("<Q", 2_000_000_000) + b"}.",
    b"\x8b" + struct.pack("<i", 2**31 - 1) + b"\x00.",
    b"T" + struct.pack("<i", -1) + b".",
    b"L" + b"9" * 100_000 + b"L\n.",
    b"I" + b"9" * 100_000 + b"\n.",
    b"F" + b"nan\n.",
    b"P" + b"1\n.",
    b"\x82\x01.",
    b"\x84\xff\xff\xff\x7f.",
    b"(" * 100_000 + b"t" * 100_000 + b".",
    b"}(" + b")" + b"\x85" * 150_000 + b"K\x01u.",  # a key of tuples in tuples in tuples: hash() recurses in C
    b"\x8f(" + b")" + b"\x85" * 150_000 + b"\x90.",
    b"}" + _text("labels") + b"]" + b"](" * 1000 + b"e" * 1000 + b"s.",
    # A list of ten lists of ten lists ...: small in the file, 10^12 elements as an array.
    b"}(" + _text("data") + b"]q\x00(K\x01K\x02e" + b"".join(
        b"0]q" + bytes([i + 1]) + b"(" + (b"h" + bytes([i])) * 10 + b"e" for i in range(12)
    ) + _text("labels") + b"h\x0cu.",
    _ARRAY + b"(J\xff\xff\xff\x7ftX\x01\x00\x00\x00b\x87R.",
    b"}(" + _text("data") + _ARRAY + b"(K\x00tX\x01\x00\x00\x00b\x87R(K\x01(J\xff\xff\xff\x7ft" + _UINT8
    + b"\x89C\x01xtb" + _text("labels") + b"]u.",
    b"cnumpy\nndarray\n(J\x00\x00\x00\x70tR.",
    b"}(" + _text("data") + b"cnumpy\nndarray\n(J\x00\x00\x00\x70" + _UINT8 + b"tR" + _text("labels") + b"](K\x01eu.",
    b"}(" + _text("data") + b"cnumpy\nndarray\n((J\x00\x00\x00\x30t" + _UINT8 + b"tRq\x01" + _text("labels")
    + b"](h\x01h\x01h\x01h\x01eu.",
    b"cnumpy\ndtype\n(" + _text("V2000000000") + b"tR.",
    b"cnumpy\ndtype\n(" + _text("u1," * 30_000 + "u1") + b"tR.",
    # A type whose size is changed after an array has taken it: reading the array would leave its memory.
    b"}(" + _text("data") + _ARRAY + b"(K\x04tcnumpy\ndtype\n(" + _text("V8") + b"K\x00K\x01tRq\x05\x87R0h\x05(K\x03"
    + _text("|") + b"NNNJ\xff\xff\xff\x0fK\x01K\x00tb" + _text("labels") + b"]u.",
    b"c_codecs\nencode\n(" + _text("x") + _text("zlib") + b"tR.",
    b"cnumpy.core.numeric\n_frombuffer\n(C\x04abcdcnumpy\ndtype\n(" + _text("O") + b"tR(K\x01tX\x01\x00\x00\x00CtR.",
)  # fmt: skip
