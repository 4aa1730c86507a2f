"""One thin servicer per public service."""
