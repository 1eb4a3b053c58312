"""Guest memory that outlives the hypervisor's kernel: console, command line and control process."""

__version__ = "0.1.0"
