"""Artefacts on disk and the database."""
