"""One module for each op family: `check()` and `bench(bandwidth)`; `gpu_ops.py` runs them."""
