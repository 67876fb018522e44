"""SIGTERM and SIGINT ask to stop; only a second SIGINT does not wait."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from resnet_jax.parallel.signals import StopSignal

# Its main thread is in a C function for minutes, where Python runs no handler.
BUSY = """
import hashlib, sys
from resnet_jax.parallel.signals import StopSignal
with StopSignal():
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
"""


def wait_for_signum(stop):
    until = time.monotonic() + 60  # a loaded machine
    while not stop.signum and time.monotonic() < until:
        time.sleep(0.001)
    return stop.signum


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_only_noted(signum):
    before = signal.getsignal(signum)
    with StopSignal() as stop:
        assert stop.signum == 0
        assert "stop_signal" in [thread.name for thread in threading.enumerate()]
        os.kill(os.getpid(), signum)
        assert wait_for_signum(stop) == signum
    assert signal.getsignal(signum) is before
    assert signal.set_wakeup_fd(-1) == -1
    assert "stop_signal" not in [thread.name for thread in threading.enumerate()]


def test_further_sigterms_change_nothing():
    with StopSignal() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            assert wait_for_signum(stop) == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)  # the first of its kind
        time.sleep(0.05)
        assert stop.signum == signal.SIGTERM


def test_in_another_thread_there_is_nothing_to_hear():
    def enter():
        with StopSignal() as stop:
            seen.append(stop.signum)

    seen = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [0]


def test_a_second_sigint_leaves_at_once_from_within_compiled_code():
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "busy\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.3)
        for _ in range(100):  # again where the first has not been heard yet, on a loaded machine
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.5)
                break
        assert process.returncode == 128 + signal.SIGINT
    finally:
        process.kill()
