"""Adapting a model in place, and undoing it."""
