"""What the tests of several tiers use: worlds, services, guests, the lab."""
