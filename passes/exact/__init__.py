"""Passes that keep the function: answers differ by rounding only."""
