from test_compile import *  # noqa: F403
