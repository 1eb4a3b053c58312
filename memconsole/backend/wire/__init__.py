"""The control socket: Varlink service and client."""
