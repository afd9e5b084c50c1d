"""Bitune's own plugins. They use the same hooks as all others."""
