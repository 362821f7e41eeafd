"""The microbenchmark of moe_ext: ``python -m bench`` in a checkout, ``moe-bench`` from a wheel."""
