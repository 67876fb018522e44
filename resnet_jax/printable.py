"""Text of others, made safe to print: a name in it must not command the terminal."""

from __future__ import annotations

import re

# Control characters, among them the escape that begins a command to a terminal; those that reverse or break a line;
# and halves of characters, by which Python stands for bytes of a file name that are not UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return a line that shows the unprintable characters of `text` as \xNN, \n, or \uNNNN."""
    return _UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # os.fsdecode() of a byte
        return f"\\x{code - 0xDC00:02x}"
    return match[0].encode("unicode_escape").decode("ascii")
