"""A download is the right file or an error, whatever the server does; nothing that is incomplete is left."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import pathlib
import resource
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from resnet_jax.data import cifar10, download, load_dataset
from resnet_jax.errors import UserError

CONTENT = bytes(range(256)) * 4000  # 1 MB
Handler = http.server.BaseHTTPRequestHandler


def answer(handler: Handler, content: bytes = CONTENT, length: int | None = len(CONTENT)) -> None:
    handler.send_response(200)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    handler.end_headers()
    handler.wfile.write(content)


def stall(handler: Handler) -> None:
    answer(handler, CONTENT[:1000])
    time.sleep(1)


def drip(handler: Handler) -> None:
    answer(handler, b"")
    for byte in CONTENT[:200]:  # ten seconds
        handler.wfile.write(bytes([byte]))
        time.sleep(0.05)


def silent(handler: Handler) -> None:
    time.sleep(1)


def not_http(handler: Handler) -> None:
    handler.wfile.write(b"what?\r\n\r\n")


def redirect(place: str) -> Callable[[Handler], None]:
    def handle(handler: Handler) -> None:
        handler.send_response(302)
        handler.send_header("Location", place)
        handler.end_headers()

    return handle


def press_ctrl_c(handler: Handler) -> None:
    answer(handler, CONTENT[:100_000])
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.5)


@contextlib.contextmanager
def serve(handle: Callable[[Handler], None]) -> Iterator[str]:
    """Answer every request with `handle`; yield the address."""

    class Server(Handler):
        def do_GET(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):  # the client has seen enough
                answer(self) if self.path == "/good" else handle(self)

        def log_message(self, *arguments: Any) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    httpd.daemon_threads, httpd.block_on_close = True, False
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/"
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    monkeypatch.setattr(download, "PATIENCE", 0.5)
    monkeypatch.setattr(download, "LEAST_BYTES", 1000)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def fetch_cifar10(url: str, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "URL", url)
    monkeypatch.setattr(cifar10, "ARCHIVE_BYTES", len(CONTENT))
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5(CONTENT).hexdigest())
    monkeypatch.setattr(cifar10, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    load_dataset("cifar10", folder)


@pytest.mark.parametrize(
    ("handle", "message"),
    [
        (stall, "timed out"),
        (silent, "timed out"),
        (drip, r"sent only \d+ bytes in \d s"),
        (lambda handler: answer(handler, CONTENT[:-1]), "connection ended after 1,023,999 of 1,024,000 bytes"),
        (lambda handler: answer(handler, CONTENT[:-1], None), "connection ended after 1,023,999 of 1,024,000 bytes"),
        (lambda handler: answer(handler, CONTENT + b"x", None), "is larger than 1,024,000 bytes"),
        (lambda handler: answer(handler, CONTENT[:-1] + b"x"), "of MD5 [0-9a-f]{32}, not"),
        (lambda handler: answer(handler, b"", 0), "connection ended after 0 of 1,024,000 bytes"),
        (not_http, "what"),
        (lambda handler: handler.send_error(503), "HTTP Error 503"),
        (redirect("file:///etc/passwd"), "not allowed|not followed"),
        (redirect("ftp://127.0.0.1/x"), "not followed"),
        (redirect("data:,x"), "not allowed|not followed"),
        (redirect("/x"), "infinite loop"),
        (lambda handler: answer(handler), "truncated, damaged or no .tar.gz"),  # complete, but no archive
    ],
)
def test_what_can_go_wrong(
    handle: Callable[[Handler], None], message: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic()
    with serve(handle) as url, pytest.raises(UserError, match=f"could not download CIFAR-10 .*{message}") as caught:
        fetch_cifar10(url, tmp_path / "data", monkeypatch)
    assert "\n" not in str(caught.value)
    assert "or pass --data.dir FOLDER" in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert time.monotonic() - began < 5


def test_a_redirection_within_the_web_is_followed(tmp_path: pathlib.Path) -> None:
    sha256 = {"sha256": hashlib.sha256(CONTENT).hexdigest()}
    with serve(redirect("/good")) as url:
        download.fetch(url, tmp_path / "file", size=len(CONTENT), digests=sha256, title="file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_from_https_to_http_is_not_followed() -> None:
    def redirected(before: str, after: str) -> Any:
        request = urllib.request.Request(before)
        return download._WebOnly().redirect_request(request, None, 302, "", None, after)  # type: ignore[arg-type]

    with pytest.raises(UserError, match="https://a/ redirects to http://a/, which is not followed"):
        redirected("https://a/", "http://a/")
    assert redirected("https://a/", "https://b/").full_url == "https://b/"
    assert redirected("http://a/", "https://b/").full_url == "https://b/"


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x"])
def test_only_the_web_is_opened(url: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(OSError, match="unknown url type"):
        download.fetch(url, tmp_path / "file", size=1, digests={}, title="file")
    assert not list(tmp_path.iterdir())


def test_a_slow_server_that_makes_progress_is_waited_for(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(handler: Handler) -> None:
        answer(handler, b"")
        for start in range(0, len(CONTENT), 100_000):
            handler.wfile.write(CONTENT[start : start + 100_000])
            time.sleep(0.1)

    with serve(slow) as url:
        download.fetch(url, tmp_path / "file", size=len(CONTENT), digests={}, title="file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_full_disk(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files may not grow beyond 100,000 bytes, which the system reports in the same way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serve(answer) as url:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(UserError, match="could not download CIFAR-10 .*File too large"):
                fetch_cifar10(url, tmp_path / "data", monkeypatch)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_ctrl_c(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with serve(press_ctrl_c) as url, pytest.raises(KeyboardInterrupt):
            fetch_cifar10(url, tmp_path / "data", monkeypatch)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.iterdir())
