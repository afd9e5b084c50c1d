"""What is saved of an adapter: its settings, its weights and their keys. No PEFT, so that vLLM reads it without."""
