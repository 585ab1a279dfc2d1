"""Two profiles of hypothesis: the suite's, which draws the same examples everywhere, and one that looks for new ones.

`pytest tests/properties --hypothesis-profile=search` draws ten times as many, anew each time.
"""

from hypothesis import settings

# No deadline: the first example of a shape is compiled. No database: a failing example belongs into a test of its own.
settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=25)
settings.register_profile("search", deadline=None, max_examples=250, print_blob=True)
settings.load_profile("suite")
