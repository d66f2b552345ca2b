"""Follow the gateway: every new version is exported, and served in place of the one before."""
