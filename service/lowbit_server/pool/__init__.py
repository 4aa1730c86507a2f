"""The worker processes as the front sees them: start, watch, load, unload."""
