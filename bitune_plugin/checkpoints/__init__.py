"""Adapters in folders, without a model: read, checked, converted, written."""
