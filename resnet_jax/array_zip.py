"""Read .npz files that are not trusted: nothing is unpickled, evaluated or unpacked."""

from __future__ import annotations

import math
import re
import struct
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

import numpy as np

# As numpy writes it; np.load would evaluate it as Python, and allocate whatever shape it claims.
_HEADER = re.compile(
    r"\{'descr': '([<>|][biuf][1248])', 'fortran_order': (True|False), 'shape': \(((?:\d+, ?)*\d*)\), \} *\n"
)
_MAGIC = b"\x93NUMPY\x01\x00"


def read_arrays(file: Path | BinaryIO, names: Collection[str], optional: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Read arrays of numbers that np.savez() wrote.

    Args:
      file: the .npz file.
      names: of the arrays.
      optional: names of arrays that need not be there.

    Returns:
      Arrays by name; they may not be written to.

    Raises:
      OSError: it cannot be read.
      ValueError: it is damaged, has no such array, or one that is compressed or holds other things than numbers.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            wanted = [name for name in (*names, *optional) if name in names or f"{name}.npy" in members]
            arrays = {}
            for name in wanted:
                if f"{name}.npy" not in members:
                    raise ValueError(f"there is no array {name!r} in it")
                info = members[f"{name}.npy"]
                if info.compress_type != zipfile.ZIP_STORED:  # so that no array is larger than the file
                    raise ValueError(f"the array {name!r} is compressed")
                arrays[name] = _read_array(archive.read(info), name)
            return arrays
    except (OSError, ValueError):
        raise
    except Exception as error:  # zipfile raises half a dozen types for a damaged file
        raise ValueError(f"damaged, or no .npz file ({str(error)[:100]})") from error


def _read_array(content: bytes, name: str) -> np.ndarray:
    if not content.startswith(_MAGIC) or len(content) < 10:
        raise ValueError(f"{name!r} is no array")
    (length,) = struct.unpack_from("<H", content, 8)
    match = _HEADER.fullmatch(content[10 : 10 + length].decode("latin-1"))
    if match is None:
        raise ValueError(f"{name!r} is no array of numbers")
    dtype, shape = np.dtype(match[1]), tuple(map(int, re.findall(r"\d+", match[3])))
    if len(shape) > 8 or dtype.itemsize * math.prod(shape) != len(content) - 10 - length:
        raise ValueError(f"the array {name!r} has another size than it says")
    array = np.frombuffer(content, dtype, offset=10 + length).reshape(shape, order="F" if match[2] == "True" else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)
