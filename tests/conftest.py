"""Settings of all tests.

Hypothesis draws the same examples every time, so that a change is judged by its own effect; fresh ones are drawn by
HYPOTHESIS_PROFILE=explore, which a developer runs to look for what the fixed ones miss.
"""

import os

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
