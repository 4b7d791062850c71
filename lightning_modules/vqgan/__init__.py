"""VQGAN: the tokenizer under the five papers."""
