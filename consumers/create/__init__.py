"""Creating experts, all of one base model and one LoRA initialisation.

request     what an operator asks for, held against an expert that exists
base_model  what must be known of the base model, found out by a process of its own
beginning   an expert at version 0: its spec, rules, meta and weights
ensure      create those that do not exist yet, when an aggregator starts
add         create one more in a federation that runs
"""

from consumers.create.base_model import STOPPED
from consumers.create.ensure import ensure_experts
from consumers.create.request import SpecRequest, parse_experts

__all__ = ["STOPPED", "SpecRequest", "ensure_experts", "parse_experts"]
