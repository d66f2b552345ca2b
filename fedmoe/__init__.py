"""FedMoE: asynchronous federated fine-tuning of LoRA experts over nothing but a Redis."""

__version__ = "0.1.0"
