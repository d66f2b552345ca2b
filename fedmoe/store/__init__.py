"""The only package that sends Redis commands."""
