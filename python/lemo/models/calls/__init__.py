"""Calls of a model: what they were given, what they return, and what takes a forward's place."""
