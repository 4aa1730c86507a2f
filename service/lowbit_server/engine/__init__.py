"""Batches requests and makes tokens, step by step."""
