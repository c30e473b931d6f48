"""Text and token ids: the tokenizer, the dialog format, stop strings."""
