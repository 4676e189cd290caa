"""Relevance: which blocks of a prompt its answers need."""
