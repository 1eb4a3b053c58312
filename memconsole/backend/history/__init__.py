"""Snapshots of the past, on disk."""
