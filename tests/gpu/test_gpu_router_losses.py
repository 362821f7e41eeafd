from test_router_losses import *  # noqa: F403
