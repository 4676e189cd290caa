"""What `lemo prepare` runs: exact scores, training of the predictors, thresholds, one folder."""
