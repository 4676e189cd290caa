"""Elimination in Hugging Face causal language models."""
