"""Readers of kernel truth, one file a source; they know nothing of the ledger."""
