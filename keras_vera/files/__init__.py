"""Adapter files: saved, loaded, combined and shared."""
