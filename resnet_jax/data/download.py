"""Download one file of known size and checksums: complete and right, or an error."""

from __future__ import annotations

import hashlib
import http.client
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from resnet_jax.errors import UserError

TIMEOUT = 20.0  # seconds without any answer
PATIENCE = 60.0  # seconds in which at least LEAST_BYTES must come
LEAST_BYTES = 60_000


def fetch(url: str, path: Path, *, size: int, digests: dict[str, str], title: str) -> None:
    """Download a file; where this raises, what is at `path` is no good.

    Args:
      url: http or https.
      path: to write to.
      size: in bytes, exactly.
      digests: hexadecimal checksums by their names in hashlib.
      title: beside the progress bar.

    Raises:
      UserError: another size or checksum, a redirection to elsewhere than the web, or too slow a server.
      OSError, http.client.HTTPException: the connection failed, or the disk.
    """
    hashes = {name: hashlib.new(name, usedforsecurity=name != "md5") for name in digests}
    received = 0
    with _opener().open(url, timeout=TIMEOUT) as response, path.open("wb") as file:
        for chunk in _with_progress(_chunks(response, url), size, title):
            received += len(chunk)
            if received > size:
                raise UserError(f"{url} is larger than {size:,} bytes")
            file.write(chunk)
            for each in hashes.values():
                each.update(chunk)
    if received != size:
        raise UserError(f"{url}: the connection ended after {received:,} of {size:,} bytes")
    for name, each in hashes.items():
        if each.hexdigest() != digests[name]:
            raise UserError(f"{url} gave {received:,} bytes of {name.upper()} {each.hexdigest()}, not {digests[name]}")


def _chunks(response: http.client.HTTPResponse, url: str) -> Iterator[bytes]:
    """Yield what comes, as it comes; a server that only drips would keep each single read from timing out."""
    began, recent = time.monotonic(), 0
    # read1() returns after one answer of the server; read() would wait until so many bytes are there.
    while chunk := response.read1(1 << 18):
        yield chunk
        recent += len(chunk)
        now = time.monotonic()
        if now - began > PATIENCE:
            if recent < LEAST_BYTES:
                raise UserError(f"{url} sent only {recent:,} bytes in {now - began:.0f} s")
            began, recent = now, 0


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirections to http and https, and none from https to http."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        scheme = urllib.parse.urlparse(newurl).scheme
        if scheme not in ("http", "https") or (req.type, scheme) == ("https", "http"):
            raise UserError(f"{req.full_url} redirects to {newurl[:200]}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Return what opens http and https; urlopen() would open files and FTP, too."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,  # of the environment: https_proxy
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        _WebOnly,
    ):
        opener.add_handler(handler())
    return opener


def _with_progress(chunks: Iterable[bytes], total: int, title: str) -> Iterator[bytes]:
    """Show how much of `total` bytes has come, on a terminal only."""
    if not sys.stderr.isatty():
        yield from chunks
        return
    from rich import progress
    from rich.console import Console

    columns = (progress.TextColumn(title), progress.BarColumn(), progress.DownloadColumn())
    with progress.Progress(*columns, progress.TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        for chunk in chunks:
            yield chunk
            bar.update(task, advance=len(chunk))
