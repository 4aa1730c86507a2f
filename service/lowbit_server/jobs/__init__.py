"""Long work: its queue, its records and its own process."""
