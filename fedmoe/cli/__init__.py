"""The command line. It is thin and starts quickly, because the commands import heavy modules themselves."""
