"""Text to batches: sources, tokenizers, the token cache, and the feeds of the training loop."""
