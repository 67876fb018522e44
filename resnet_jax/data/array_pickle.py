"""Read pickled numpy arrays from files that are not trusted."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np

from resnet_jax.errors import UserError


def load_arrays(content: bytes) -> Any:
    """Unpickle dicts, lists, bytes, numbers and arrays; Python 2's `str` becomes bytes.

    Raises:
      UserError: it names any other class or function; nothing of it is run or imported.
      Exception: of any type, where `content` is damaged.
    """
    return _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()


def _frombuffer(buffer: Any, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """Rebuild an array as numpy does for pickle protocol 5, the default since Python 3.14."""
    return np.frombuffer(buffer, dtype).reshape(shape, order="F" if order == "F" else "C")


def _encode(text: str, encoding: str) -> bytes:
    """Rebuild bytes as Python 3 pickles them in protocols 0 to 2; whatever `encoding` says, it is Latin-1."""
    return text.encode("latin-1")


# Unpickling calls what a file names; these are all that arrays need, handed out without an import.
_GLOBALS: dict[tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    # `__reduce__` hands over the function that every pickled array names, so numpy's insides stay closed.
    _GLOBALS[f"{_core}.multiarray", "_reconstruct"] = np.empty(0).__reduce__()[0]
    _GLOBALS[f"{_core}.numeric", "_frombuffer"] = _frombuffer
_GLOBALS["_codecs", "encode"] = _encode


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise UserError(f"refused the pickled global {module}.{name}: no array needs it")
        return _GLOBALS[module, name]
