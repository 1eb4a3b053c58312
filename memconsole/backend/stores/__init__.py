"""Where frames live and how they survive."""
