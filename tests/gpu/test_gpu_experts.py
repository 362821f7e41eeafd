from test_experts import *  # noqa: F403
