from test_permutation import *  # noqa: F403
