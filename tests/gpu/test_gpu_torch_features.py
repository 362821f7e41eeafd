from test_torch_features import *  # noqa: F403
