from test_gating_knobs import *  # noqa: F403
