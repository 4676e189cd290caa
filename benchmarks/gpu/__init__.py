"""One module for each operator: `rows(b)` measures it beside others with a `Bench`."""
