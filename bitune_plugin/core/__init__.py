"""The method on tensors: mixing, attention masks, and which token goes where. Knows no model."""
