from test_gating import *  # noqa: F403
