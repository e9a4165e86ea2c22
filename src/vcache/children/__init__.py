"""Processes that end with the one that started them, and signals that end both."""
