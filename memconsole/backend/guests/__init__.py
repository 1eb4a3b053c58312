"""What owns regions and holds grants: canary, QEMU, any process."""
