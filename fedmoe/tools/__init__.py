"""Operators' tools: export, evaluate, back up, restore, check an installation, and the reading Python API."""
