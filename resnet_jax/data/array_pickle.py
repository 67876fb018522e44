"""Read pickled numpy arrays from files that are not trusted, without unpickling them.

A pickle is a program whose instructions make values and call what they name. Here they are followed one by one, but
nothing is imported or called: the few names that every pickled array holds are known, any other ends the reading.
An Unpickler that hands out numpy's own functions for these names would not do: with a forged dtype numpy takes the
bytes of the file for addresses of objects.
"""

from __future__ import annotations

import dataclasses
import enum
import pickletools
import re
from typing import Any

import numpy as np

from resnet_jax.errors import UserError

_MOST_INSTRUCTIONS = 1_000_000  # CIFAR-10's files have some 40,000


def load_arrays(content: bytes) -> dict[Any, Any]:
    """Read a pickled dict of bytes, numbers, arrays of numbers, and lists; Python 2's `str` becomes bytes.

    Raises:
      UserError: it names any other class or function.
      Exception: of any type, where `content` is damaged or holds something else.
    """
    stack: list[Any] = []
    before_marks: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    argument: Any
    for count, (instruction, argument, _) in enumerate(pickletools.genops(content)):
        if count == _MOST_INSTRUCTIONS:
            raise ValueError("too many instructions")
        match instruction.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                before_marks.append(stack)
                stack = []
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case name if name in _AS_THEY_ARE:
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument.encode("latin-1"))
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "TUPLE" | "LIST" | "DICT":
                items, stack = stack, before_marks.pop()
                stack.append(_make(name, items))
            case "APPEND" | "SETITEM":
                size = 1 if name == "APPEND" else 2
                items = stack[-size:]
                del stack[-size:]
                _extend(stack[-1], items)
            case "APPENDS" | "SETITEMS":
                items, stack = stack, before_marks.pop()
                _extend(stack[-1], items)
            case "GLOBAL" | "INST":
                stack.append(_named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack[-2:] = [_named(*stack[-2:])]
            case "REDUCE":
                stack[-2:] = [_reduce(*stack[-2:])]
            case "BUILD":
                state = stack.pop()
                stack[-1].build(state)
            case name:
                raise ValueError(f"the instruction {name}, which no array needs")
    (value,) = stack
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}, no dict")
    return {key: item.array() if isinstance(item, _Array) else item for key, item in value.items()}


_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
_AS_THEY_ARE = {*_NUMBERS, *_TEXTS, *_BYTES}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class _Global(enum.Enum):
    """What a pickled array names: only ever compared, never imported or called."""

    NDARRAY = enum.auto()
    DTYPE = enum.auto()
    RECONSTRUCT = enum.auto()
    FROMBUFFER = enum.auto()
    ENCODE = enum.auto()


_GLOBALS = {("numpy", "ndarray"): _Global.NDARRAY, ("numpy", "dtype"): _Global.DTYPE}
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _GLOBALS[f"{_core}.multiarray", "_reconstruct"] = _Global.RECONSTRUCT
    _GLOBALS[f"{_core}.numeric", "_frombuffer"] = _Global.FROMBUFFER  # protocol 5, the default since Python 3.14
_GLOBALS["_codecs", "encode"] = _Global.ENCODE  # bytes as Python 3 pickles them in protocols 0 to 2


def _named(module: Any, name: Any) -> _Global:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ValueError("a name that is no text")
    if (module, name) not in _GLOBALS:
        raise UserError(f"refused the pickled global {module[:60]}.{name[:60]}: no array needs it")
    return _GLOBALS[module, name]


def _make(instruction: str, items: list[Any]) -> Any:
    if instruction == "TUPLE":
        return tuple(items)
    made: Any = [] if instruction == "LIST" else {}
    _extend(made, items)
    return made


def _extend(target: Any, items: list[Any]) -> None:
    """Append to a list, or add (key, value, key, value, ...) to a dict."""
    if isinstance(target, list):
        target.extend(items)
        return
    if not isinstance(target, dict):
        raise ValueError(f"items for a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, (str, bytes)):  # hashing tuples of tuples of tuples can take for ever
            raise ValueError(f"a key that is a {type(key).__name__}")
        target[key] = value


def _reduce(function: Any, arguments: Any) -> Any:
    """Make what numpy, or `_codecs`, would make of a call."""
    match function, arguments:
        case _Global.ENCODE, (str() as text, _):  # whatever the encoding is said to be, it is Latin-1
            return text.encode("latin-1")
        case _Global.DTYPE, (str() | bytes() as code, _, _):
            return _Dtype(_number_type(code))
        case _Global.RECONSTRUCT, (_Global.NDARRAY, _, _):
            return _Array()
        case _Global.FROMBUFFER, (buffer, dtype, shape, order):
            array = _Array()
            array.build((1, shape, dtype, order == "F", buffer))
            return array
    raise ValueError("a call that no array needs")


def _number_type(code: str | bytes) -> np.dtype:
    text = code.decode("ascii") if isinstance(code, bytes) else code
    if not re.fullmatch(r"[<>|=]?[biuf][1248]", text):
        raise ValueError("an array of what are no numbers")
    return np.dtype(text)


@dataclasses.dataclass
class _Dtype:
    """A type of numbers; it is made first, and told its byte order later."""

    dtype: np.dtype

    def build(self, state: Any) -> None:
        _, order, subdtype, names, fields, *_ = state
        if (subdtype, names, fields) != (None, None, None):
            raise ValueError("an array of what are no numbers")
        marks = {"<": "<", ">": ">", "|": "|", "=": "="}
        self.dtype = np.dtype(marks[order.decode() if isinstance(order, bytes) else order] + self.dtype.str[1:])


@dataclasses.dataclass
class _Array:
    """An array; it is made first, and filled later."""

    filled: np.ndarray | None = None

    def build(self, state: Any) -> None:
        _, shape, dtype, is_fortran, buffer = state
        if not (isinstance(dtype, _Dtype) and isinstance(buffer, (bytes, bytearray))):
            raise ValueError("an array without numbers")
        self.filled = np.frombuffer(buffer, dtype.dtype).reshape(shape, order="F" if is_fortran else "C")

    def array(self) -> np.ndarray:
        if self.filled is None:
            raise ValueError("an array without numbers")
        return self.filled
