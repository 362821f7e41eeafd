from test_small_rows import *  # noqa: F403
