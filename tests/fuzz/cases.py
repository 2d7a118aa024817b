"""How many cases a property is tried on, and how many it really was.

FUZZ_CASES in the environment asks for so many of every property, as recipes/benchmarks/fuzz.py does
for its long run; without, each has its own few dozens.
"""

import functools
import os
from collections import Counter

from hypothesis import HealthCheck, given, settings

TRIED = Counter()  # "module.property" -> cases


def cases(few, strategy):
    """Try a property of one argument `case` on `few` cases drawn from `strategy`."""

    def decorate(test):
        @functools.wraps(test)
        def counted(case):
            TRIED[f"{test.__module__.rpartition('.')[2]}.{test.__name__}"] += 1
            test(case)

        return settings(
            max_examples=int(os.environ.get("FUZZ_CASES", few)),
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )(given(case=strategy)(counted))

    return decorate
