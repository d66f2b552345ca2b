"""What any program needs and no library of ours has: files written whole, stopping in time, declared settings."""
