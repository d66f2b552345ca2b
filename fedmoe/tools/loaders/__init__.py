"""Scripts that `fedmoe gateway export --router` writes as load.py. They need torch, transformers and peft only."""
