"""Creating experts, all of one base model and one LoRA initialisation.

request     the operator's request, compared with an existing expert
base_model  facts about the base model, found by a child process
beginning   an expert at version 0: its spec, rules and meta
ensure      create missing experts when an aggregator starts
add         add one expert to a running federation
"""

from consumers.create.base_model import STOPPED
from consumers.create.ensure import ensure_experts, instead_of_defaults
from consumers.create.request import SpecRequest, parse_experts

__all__ = ["STOPPED", "SpecRequest", "ensure_experts", "instead_of_defaults", "parse_experts"]
