"""Memory and time of a training step before it runs, and what each layer stores of it."""
