from test_drop_in import *  # noqa: F403
