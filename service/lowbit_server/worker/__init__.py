"""The worker process: commands in, one message per engine step out."""
