"""How many examples properties are tried with: few and the same ones in tests, many new ones in a long night."""

import os

from hypothesis import HealthCheck, settings

# No clock: how fast the machine is does not matter.
settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    max_examples=200,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile("night", settings.get_profile("tests"), derandomize=False, max_examples=2_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "tests"))
