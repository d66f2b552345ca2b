"""JSONL rows, and the batches of tokens made from them."""
