"""How many cases a property is tried on, and how many it really was.

FUZZ_CASES in the environment asks for so many of every property, and FUZZ_MINUTES for no more of
the processor's time than that each, as recipes/benchmarks/fuzz.py does; without, each has its own
few dozens.
"""

import functools
import os
import time
from collections import Counter

from hypothesis import HealthCheck, given, settings

TRIED = Counter()  # property -> cases
OUT_OF_TIME = set()  # properties that were not tried on all cases asked for


def cases(few, strategy):
    """Try a property of one argument `case` on `few` cases drawn from `strategy`."""
    minutes = float(os.environ.get("FUZZ_MINUTES", "inf"))

    def decorate(test):
        started = []

        @functools.wraps(test)
        def counted(case):
            started.append(time.process_time()) if not started else None
            TRIED[test.__name__] += 0  # a property that fails at once is one that was tried
            if time.process_time() - started[0] > 60 * minutes:
                OUT_OF_TIME.add(test.__name__)
                return
            test(case)
            TRIED[test.__name__] += 1

        return settings(
            max_examples=int(os.environ.get("FUZZ_CASES", few)),
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )(given(case=strategy)(counted))

    return decorate
