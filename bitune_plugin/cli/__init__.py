"""The commands of `bitune`, one module each."""
