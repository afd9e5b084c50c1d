"""Bitune's own plugin. It uses the same hooks as all others."""
