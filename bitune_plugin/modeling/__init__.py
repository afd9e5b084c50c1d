"""The method on a transformers model. Does not import PEFT."""
