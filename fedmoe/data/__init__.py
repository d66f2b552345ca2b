"""JSONL rows and the token batches made of them."""
