"""Checks of an installation: Bitune on a tiny model against the literal computation.

`table.py` lists them. Two callers run them: the self-check (`bitune_plugin.self_check`), on untested
versions, and `bitune doctor`.
"""
