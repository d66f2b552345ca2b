"""The base model, its LoRA adapter and its fingerprint (imports transformers and peft)."""
