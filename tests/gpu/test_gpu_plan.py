from test_plan import *  # noqa: F403
