from test_grouped_gemm import *  # noqa: F403
