"""Damage to .npz files: to the archive, to the header of an array, and to the arrays themselves."""

from __future__ import annotations

import contextlib
import io
import random
from typing import Any, cast

import numpy as np

from reliability.fuzz import hostile, mutations


def damage_npz(rng: random.Random, content: bytes, field: str) -> bytes:
    """Damage one array of a .npz file, or the file."""
    kind = rng.random()
    if kind < 0.2:
        return rng.choice(hostile.npz_bombs(field))
    if kind < 0.4:
        return mutations.damage_repeatedly(rng, content)
    with np.load(io.BytesIO(content)) as loaded:
        arrays = {name: np.array(loaded[name]) for name in loaded.files}
    arrays[field] = _damage_array(rng, arrays[field])
    if rng.random() < 0.1:
        del arrays[field]
    if kind > 0.85:  # the header of an array, in an archive that is whole
        members = {f"{name}.npy": _npy(array) for name, array in arrays.items()}
        name = rng.choice(list(members))
        members[name] = mutations.at_start(mutations.damage_repeatedly, 80)(rng, members[name])
        return hostile.zip_of(members)
    file = io.BytesIO()
    np.savez(file, **cast(Any, arrays))
    return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _damage_array(rng: random.Random, array: np.ndarray) -> np.ndarray:
    flat = array.copy().reshape(-1)
    with contextlib.suppress(OverflowError, ValueError), np.errstate(all="ignore"):
        if flat.size:
            flat[rng.randrange(flat.size)] = rng.choice((0, -1, 1, 255, 2**31 - 1, -(2**63), 2**63 - 1, np.nan, np.inf))
    changed = flat.reshape(array.shape)
    with np.errstate(all="ignore"):
        return rng.choice(
            (
                changed, changed, changed, changed, flat[:0], array[..., None], np.concatenate([flat, flat]), flat[:1],
                flat[0] if flat.size else flat, array.astype(np.float64), array.astype(np.int8), array.astype("S3"),
                array.astype(np.complex64), array.astype(bool), np.zeros((0, 3), array.dtype), array.T,
                array.astype(array.dtype.newbyteorder()), np.array("2020", "M8[D]"), flat[::-1], array.astype("U2"),
            )
        )  # fmt: skip
