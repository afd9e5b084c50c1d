"""Tasks of the Bitune paper, with its templates; a folder for lm-eval's `--include_path`."""
