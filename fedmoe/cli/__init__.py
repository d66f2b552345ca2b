"""The command line; thin, and quick to start: heavy imports stand inside the commands."""
