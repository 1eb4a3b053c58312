"""How a process reaches its frames."""
