"""Who holds the file descriptors without which memory would vanish."""
