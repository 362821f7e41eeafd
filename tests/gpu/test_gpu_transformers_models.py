from test_transformers_models import *  # noqa: F403
