"""Adapters of a model: layers, what they are chosen by, their manager."""
