"""Who manages VMs that memconsole did not start, and what they have written down of them."""
