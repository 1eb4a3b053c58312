"""What was meant: the log in custody, the state folded from it, the audit trail on disk."""
