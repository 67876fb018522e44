"""Damage to files: at random to bytes, and with knowledge of the format to JSON."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]

_INTEGERS = (
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    2**15 - 1,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**64 - 1,
)
_MAGIC = (
    b"\x00", b"\xff", b"\n", b"\r\n", b"\x00" * 64, b"\xff" * 16, b"NaN", b"-1", b"1e999", b"{", b"]", b'"', b"\\",
    b"\xef\xbb\xbf", b"\xff\xfe", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"\x1f\x8b\x08", b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff", b"GIF89a", b"RIFF", b"II*\x00", b"MM\x00*", b"RGB8", b"\x80\x05", b"%!PS-Adobe", b"\xed\xa0\x80",
)  # fmt: skip


def one_of(*mutations: Mutation) -> Mutation:
    """Return a mutation that is one of `mutations`; name one twice to see it twice as often."""
    return lambda rng, content: rng.choice(mutations)(rng, content)


def flip_bits(rng: random.Random, content: bytes) -> bytes:
    """Flip a few bits."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 32)) if changed else 0):
        changed[_position(rng, changed)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(rng: random.Random, content: bytes) -> bytes:
    """Cut the end off, as a full disk or a copy that was broken off does."""
    return content[: _position(rng, content)]


def insert(rng: random.Random, content: bytes) -> bytes:
    """Insert something."""
    at = _position(rng, content)
    extra = rng.choice((rng.choice(_MAGIC), rng.randbytes(rng.randrange(1, 40)), content[at : at + 100]))
    return content[:at] + extra + content[at:]


def delete(rng: random.Random, content: bytes) -> bytes:
    """Delete a part."""
    at = _position(rng, content)
    return content[:at] + content[at + rng.choice((1, 2, 4, 16, 256)) :]


def overwrite(rng: random.Random, content: bytes) -> bytes:
    """Overwrite a part with bytes that mean something in some format."""
    at, extra = _position(rng, content), rng.choice((*_MAGIC, rng.randbytes(rng.randrange(1, 9))))
    return content[:at] + extra + content[at + len(extra) :]


def set_integer(rng: random.Random, content: bytes) -> bytes:
    """Overwrite a part with a number that is likely to be a wrong length: none, huge, negative."""
    form = rng.choice(("<B", "<H", ">H", "<I", ">I", "<Q", ">Q"))
    number = rng.choice((*_INTEGERS, len(content), len(content) + 1, rng.getrandbits(32)))
    size = struct.calcsize(form)
    at = _position(rng, content)
    return content[:at] + struct.pack(form, number % 256**size) + content[at + size :]


def replace(rng: random.Random, content: bytes) -> bytes:
    """Put another file in its place: an empty one, zeros after a crash, noise, the file twice or turned round."""
    size = rng.choice((1, 2, 8, 100, len(content)))
    return rng.choice((b"", bytes(size), rng.randbytes(size), content * 2, content[::-1], rng.choice(_MAGIC)))


damage = one_of(flip_bits, flip_bits, truncate, insert, delete, overwrite, set_integer, set_integer, replace)


def damage_repeatedly(rng: random.Random, content: bytes) -> bytes:
    """Apply one to three of all of these."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = damage(rng, content)
    return content


def splice(others: Sequence[bytes]) -> Mutation:
    """Return a mutation that goes on with the end of another valid file."""

    def mutation(rng: random.Random, content: bytes) -> bytes:
        other = rng.choice(others)
        return content[: _position(rng, content)] + other[_position(rng, other) :]

    return mutation


def at_start(mutation: Mutation, size: int) -> Mutation:
    """Restrict a mutation to the first bytes of a file, where lengths and types are."""
    return lambda rng, content: mutation(rng, content[:size]) + content[size:]


def _position(rng: random.Random, content: bytes | bytearray) -> int:
    """Choose a place; the first bytes, the headers of most formats, as often as all others together."""
    if not content:
        return 0
    return rng.randrange(min(len(content), 64)) if rng.random() < 0.5 else rng.randrange(len(content))


_TOKENS = (  # text that stands where a value stood
    "null", "true", "false", "0", "-1", "1", "-0.0", "1.5", "1e308", "-1e308", "1e-320", "1e999", "-1e999", "NaN",
    "Infinity", "2147483647", "2147483648", "4294967296", "9223372036854775808", "1" + "0" * 400, "9" * 5000, '""',
    '"x"', '"NaN"', '"../../x"', '"/etc/passwd"', '"\\u0000"', '"\\ud800"', '"\\u001b[31m\\n"', '"%s{0}"', "[]", "{}",
    "[[]]", "[0, 0, 0]", "[1, 2, 3]", "[null, null]", '["a", "b"]', '{"a": 1}', "[1e400, 1, 1]", "[" * 50 + "]" * 50,
    "[" * 100_000 + "]" * 100_000, '{"a":' * 20_000 + "1" + "}" * 20_000, '"' + "x" * 100_000 + '"',
    "[" + "0," * 20_000 + "0]",
)  # fmt: skip
_MARK = "\x01value\x01"  # no valid file holds it


def damage_json(rng: random.Random, content: bytes) -> bytes:
    """Give one or two values in a JSON document another type or size; or take away, rename or repeat something."""
    document = json.loads(content)
    for _ in range(rng.choice((1, 1, 2))):
        containers = [node for node in _nodes(document) if isinstance(node, dict | list) and node]
        if containers:
            _change(rng, rng.choice(containers))
    text = json.dumps(document)
    while json.dumps(_MARK) in text:
        text = text.replace(json.dumps(_MARK), rng.choice(_TOKENS), 1)
    return text.encode()


def _nodes(document: Any) -> list[Any]:
    found = [document]
    for node in found:  # which grows on the way
        if isinstance(node, dict | list):
            found += node.values() if isinstance(node, dict) else node
    return found


def _change(rng: random.Random, node: Any) -> None:
    key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    match rng.randrange(8):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[rng.choice(("", "x", "\x00", "a" * 5000, f"{key}s"))] = node.pop(key)
        case 1:
            node.append(node[key])
        case 2:
            node[key] = node[rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))]
        case _:
            node[key] = _MARK


def whole_json(rng: random.Random, content: bytes) -> bytes:
    """Put another document in its place, or other bytes that stand for the same one."""
    text = content.decode(errors="replace")
    return rng.choice(
        (
            *(token.encode() for token in _TOKENS),
            b"[" * 200_000, b'{"a":' * 200_000, b"\xef\xbb\xbf" + content, content.replace(b"a", b"\xff"),
            text.encode("utf-16"), content.replace(b"\n", b"\x00"), b"[" + content + b"]", content + content,
            b'"' + content, content.replace(b":", b""), content.replace(b" ", "\u2028".encode()),
        )
    )  # fmt: skip


json_document = one_of(damage_json, damage_json, damage_json, damage_json, whole_json, damage_repeatedly)


def json_lines(rng: random.Random, content: bytes) -> bytes:
    """Damage one line of a file of JSON objects, or the file."""
    if rng.random() < 0.15:
        return damage_repeatedly(rng, content)
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    match rng.randrange(8):
        case 0:
            lines[at] = lines[at][: rng.randrange(len(lines[at]))]
        case 1:
            lines.insert(at, rng.choice(lines))
        case 2:
            lines[at] = whole_json(rng, lines[at])
        case _:
            lines[at] = damage_json(rng, lines[at])
    return b"\n".join(lines) + b"\n" * (rng.random() < 0.8)
