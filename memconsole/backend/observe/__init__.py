"""Kernel truth beside what was meant: Snapshots, findings, PFN tables."""
