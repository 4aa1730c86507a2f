"""Runs the server: `python -m lowbit_server`."""

from lowbit_server.cli import app

app(prog_name="lowbit-server")
