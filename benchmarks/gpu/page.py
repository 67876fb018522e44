"""The Markdown of what was found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.gpu.profile import KINDS
from benchmarks.report import describe, number, table

Record = dict[str, Any]


def render(records: Iterable[Record]) -> str:
    """Return the page of all records of a folder: of each piece the last counts."""
    machines: dict[str, None] = {}
    last: dict[str, Record] = {}
    for record in records:
        if "machine" in record:
            machines[describe(record)] = None
        else:
            last[record["piece"]] = record
    pieces = {name: record["result"] for name, record in last.items()}

    def having(word: str) -> list[dict[str, Any]]:
        return [result for name, result in pieces.items() if name.split()[0] == word]

    parts = ["# On a card", *machines]
    parts += [_tests(result) for result in having("tests")]
    parts += [_repeated(result) for result in having("repeated") if "peers" in result]
    for word, title in (("speed", "## Speed"), ("against", "## This checkout and the one before")):
        if cases := [result for result in having(word) if "peers" in result]:
            rows, settings = table(cases)
            parts += [title, rows, settings]
    if profiled := _kernels(having("speed")):
        parts.append(profiled)
    if runs := [name for name in pieces if name.startswith("train ")]:
        parts.append(_runs({name.split()[1]: pieces[name] for name in runs}))
    unfinished = [f"- {name}: {result['error']}" for name, result in pieces.items() if "error" in result]
    if unfinished:
        parts.append("## Not finished\n\n" + "\n".join(unfinished))
    return "\n\n".join(parts) + "\n"


def _tests(result: dict[str, Any]) -> str:
    if "error" in result:
        return "## Unit tests\n\nnot run to their end"
    counts = ", ".join(f"{result[word]} {word}" for word in ("passed", "failed", "skipped", "errors") if word in result)
    lines = [f"- {test}" for test in result["failed_tests"]]
    return "\n".join([f"## Unit tests\n\n{counts}, of {', '.join(result['files'])}", *lines])


def _repeated(result: dict[str, Any]) -> str:
    """One seed in two processes, twice in each."""
    rows, _ = table([result])
    digests = {peer: found.get("digests") for peer, found in result["peers"].items()}
    lines = []
    for peer in ("ours", "ours, deterministic"):
        first, second = digests[peer], digests[f"{peer}, again"]
        if first and second:
            steps = result["peers"][peer]["digest_steps"]
            within = "the same" if len(set(first)) == len(set(second)) == 1 else "different"
            between = "the same" if first[0] == second[0] else "different"
            lines.append(f"- {peer}: {within} bits twice in one process, {between} bits in two, after {steps} steps")
    return "\n\n".join(["## The same run again, and with --xla_gpu_deterministic_ops", rows, "\n".join(lines)])


def _kernels(results: list[dict[str, Any]]) -> str:
    """A table of the kernels by kind."""
    rows = [
        f"| case | kernels a step | busy, us | of us | {' | '.join(KINDS)} |",
        f"|---|---:|---:|---:|{'---:|' * len(KINDS)}",
    ]
    for result in results:
        for peer, found in result.get("peers", {}).items():
            if profile := found.get("profile"):
                kinds = [f"{number(us)} in {count:.0f}" for us, count in (profile["kinds"][kind] for kind in KINDS)]
                case = result["case"]
                cells = [f"{case['network']} {case['dtype']}, batch {case['batch_size']}, {peer}"]
                cells += [f"{profile['kernels']:.0f}", number(profile["busy_us"]), number(profile["span_us"])]
                rows.append(f"| {' | '.join([*cells, *kinds])} |")
    title = "## Kernels of a step by kind: us and number\n\nBy their names; each in the first kind that fits.\n\n"
    return title + "\n".join(rows) if len(rows) > 2 else ""


def _runs(runs: dict[str, dict[str, Any]]) -> str:
    rows = [
        "| run | steps | begun at | seconds | images/s, median | test error, last step | last ten evaluations |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, found in runs.items():
        if "step" not in found:
            continue
        error, errors = found["test_error"], found["last_test_errors"]
        cells = [name, f"{found['step']:,}", f"{found['begun_at']:,}", number(found["seconds"])]
        cells += [number(found["images_per_second"]), "" if error is None else f"{error:.2f} %"]
        cells += [f"{min(errors):.2f} to {max(errors):.2f} %" if errors else ""]
        rows.append(f"| {' | '.join(cells)} |")
    return "## Networks trained\n\n" + "\n".join(rows)
