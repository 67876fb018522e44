"""Damaged files never crash a reader; and the fuzzer that says so notices every way in which one could."""

from __future__ import annotations

import importlib.util
import pathlib
import random
import re

import pytest

from reliability.fuzz import mutations
from reliability.fuzz.case import damaged_files
from reliability.fuzz.fuzzer import main
from reliability.fuzz.readers import READERS

needs_coverage = pytest.mark.skipif(importlib.util.find_spec("coverage") is None, reason="coverage is not installed")


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, list[str]]:
    code = main([*args, "--workers", "2"])
    lines = capsys.readouterr().out.splitlines()
    print("\n".join(lines))  # shown where the test fails, or with -s
    return code, lines


@needs_coverage
def test_no_damaged_file_breaks_a_reader(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(capsys, "--cases", "2500", "--seed", "1", "--keep", str(tmp_path))
    assert code == 0
    assert not list(tmp_path.iterdir())
    check_table(lines, 2_500)


@pytest.mark.slow
@needs_coverage
def test_no_damaged_file_of_many_breaks_a_reader(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(capsys, "--cases", "12000", "--keep", str(tmp_path))
    assert code == 0
    check_table(lines, 12_000)


def check_table(lines: list[str], cases: int) -> None:
    """Every reader has accepted and refused files, and most of its lines were reached."""
    rows = {line.split()[0]: line.replace(",", "").split() for line in lines if line and not line.startswith("-")}
    for name in READERS.keys() & rows.keys():
        _, count, accepted, refused, failed, *_ = rows[name]
        assert int(count) == int(accepted) + int(refused) + int(failed) > 0
        assert failed == "0"
        assert name == "metrics" or int(refused) > int(count) / 10  # whose damaged lines are left out
        assert int(accepted) > 0
    assert READERS.keys() - rows.keys() <= {"torch"}  # which is not everywhere
    assert int(rows["all"][1]) >= cases
    assert int(re.search(r"(\d+) % of", " ".join(rows["all"]))[1]) > 75  # type: ignore[index]


def test_a_case_depends_on_nothing_but_its_number() -> None:
    reader = READERS["config"]
    first, again, other, seeded = (
        damaged_files(reader, reader.make(), seed, number) for seed, number in ((0, 5), (0, 5), (0, 6), (1, 5))
    )
    assert first == again
    assert first != other
    assert first != seeded


def test_damage_is_damage() -> None:
    content = bytes(range(200))
    for mutation in (mutations.flip_bits, mutations.truncate, mutations.insert, mutations.delete):
        assert all(mutation(random.Random(seed), content) != content for seed in range(50))
    for mutation in (mutations.damage, mutations.damage_repeatedly, mutations.splice([content])):
        for seed in range(50):
            assert isinstance(mutation(random.Random(seed), b""), bytes)  # an empty file, too


BROKEN = {
    "key-error": "KeyError: 'b'",
    "wrong-result": "AssertionError: labels out of range",
    "nameless": "the message does not name the file",
    "hangs": "not done after 1 seconds",
    "hangs-in-except": "not done after 1 seconds",
    "memory": r"took \d+ MiB of memory",
    "memory-error": "more memory was wanted than there is",
    "dies": "the process died: exit code -11",
    "deaf": "the process died: exit code -9",
}


@needs_coverage
def test_the_fuzzer_notices_every_fault(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reliability.fuzz.fuzzer._PATIENCE", 1.0)
    names = [argument for name in (*BROKEN, "sound") for argument in ("--reader", name)]
    limits = ["--seconds", "1", "--memory", "32"]
    code, lines = run(capsys, "--module", "broken_readers", *limits, "--keep", str(tmp_path), "--cases", "20", *names)
    assert code == 1
    for name, message in BROKEN.items():
        failures = [line for line in lines if line.startswith(f"{name}, case ")]
        assert len(failures) == 2  # also after the process has died at the first
        for number, line in enumerate(sorted(failures)):
            kept = tmp_path / f"{name}-seed0-case{number}"
            assert line.startswith(f"{name}, case {number}: ")
            assert line.endswith(f"kept in {kept}")
            assert re.search(message, (kept / "failure.txt").read_text())
            assert (kept / "file.json").read_bytes().startswith(b"damaged")
    assert not [line for line in lines if line.startswith("sound, case")]
    (row,) = [line.split() for line in lines if line.startswith("sound")]
    assert row[1:5] == ["2", "0", "2", "0"]
