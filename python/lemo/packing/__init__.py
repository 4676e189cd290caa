"""Packed batches: sequences, their blocks, and the rows that are kept."""
