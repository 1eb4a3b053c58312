"""Readers of kernel truth, one file a source; they know nothing of the ledger.

    tree        how a file below a root is read, and what a reader raises
    host memory iomem dax kho                   one source each, from text to values of the model
    procmaps    the VMAs of a process
    census      one pass over all processes: stat, fd links, maps
    kvm memfds pci                              joined from the census
    iommu vtd   groups and units; Intel's page tables from debugfs
    probes      what only a system call can tell
    record      a copy of all that, to be read on another machine

Every reader takes ``root``, the directory the tree of a host stands in: ``/`` for this host, or a copy of another
host's files. A reader that cannot read its source raises one of :data:`tree.UNREADABLE`; :func:`tree.gap` makes it a
Gap of the Snapshot.
"""
