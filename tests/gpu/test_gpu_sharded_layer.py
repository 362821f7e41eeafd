from test_sharded_layer import *  # noqa: F403
