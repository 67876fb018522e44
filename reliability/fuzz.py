"""Read damaged files all night: python -m reliability.fuzz [--minutes N] [--only READER].

The properties of tests/hardening/test_fuzz.py, again and again with new seeds and many examples, in a process of its
own each time, so that the death of one is seen. The first failure is shown as pytest shows it; the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "hardening" / "test_fuzz.py"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m reliability.fuzz", description=__doc__.partition(":")[0])
    parser.add_argument("--minutes", type=float, default=480.0, help="about so long (default 480)")
    parser.add_argument("--only", metavar="READER", default="", help="a word in the names of the tests to run")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "night"}
    rounds = 0
    while rounds == 0 or time.monotonic() < until:
        seed = random.SystemRandom().randrange(2**32)
        command = [sys.executable, "-m", "pytest", "-x", "-q", str(TESTS), f"--hypothesis-seed={seed}"]
        code = subprocess.run([*command, "-k", options.only], cwd=ROOT, env=environment).returncode
        if code:
            print(f"FAILED with exit code {code} (negative: of a signal); seed {seed}")
            return 1
        rounds += 1
    print(f"{rounds} rounds, no failure")
    return 0


if __name__ == "__main__":
    sys.exit(main())
