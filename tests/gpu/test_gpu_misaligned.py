from test_misaligned import *  # noqa: F403
