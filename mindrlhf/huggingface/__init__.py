"""Weights, configuration and tokenizer in and out of Hugging Face's formats."""
