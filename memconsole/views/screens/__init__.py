"""One screen a view of the Snapshot."""
