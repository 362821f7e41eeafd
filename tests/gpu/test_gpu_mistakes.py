from test_mistakes import *  # noqa: F403
