"""Text in, text out: chat template, tokenizer, detokenizer and stop strings, from a Hugging Face folder."""
