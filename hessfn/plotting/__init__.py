"""Figures of what the other functions return."""
