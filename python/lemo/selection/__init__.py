"""Which blocks every sub-block keeps: policies, scores, statistics."""
