"""The handoff: what carries guests over a kexec."""
