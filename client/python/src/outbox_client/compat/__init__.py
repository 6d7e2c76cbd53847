"""Layers that stand in for other libraries."""
