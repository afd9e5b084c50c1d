"""The method on a transformers model. Knows nothing of PEFT."""
