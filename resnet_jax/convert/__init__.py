"""Weights from other frameworks and for them."""
