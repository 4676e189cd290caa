"""What ``lemo demo`` runs: a small model on the Python sources at hand, up to a report."""
