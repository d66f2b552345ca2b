"""The gateway: the experts merged into one adapter that knows all domains."""
