from test_all_to_all import *  # noqa: F403
