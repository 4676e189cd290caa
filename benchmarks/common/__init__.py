"""What the benchmarks share: processes, records, times and models with random weights."""
