"""What a host can do, and whether a file is whole."""
