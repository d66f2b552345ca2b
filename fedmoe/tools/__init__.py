"""Operators' jobs: export, evaluate, back up, keep updates, look at an installation."""
