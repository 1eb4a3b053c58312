"""What one kernel hands over to the next: a decoder of KHO's and LUO's own structures, live or from a dump.

    abi         the words by which layouts are called
    values      what was found, as values
    memory      physical memory: /proc/kcore, /dev/mem, an ELF core
    fdt         flattened device trees
    radix       the tree of preserved pages
    records     LUO's sessions and files, memfds, vmalloc arrays, blocks
    decode      all of it together: ``decode``, ``live``, ``describe``

Layouts are of kho-v4 and luo-v5 (include/linux/kho/abi). Whatever is of another ``compatible`` is shown as opaque.
Structures come from memory that anything may have overwritten: a parser reads every page once, at most, and raises
BadFile for what cannot be; it never follows a circle.
"""

from memconsole.backend.kernel.handover.decode import decode, describe, live

__all__ = ["decode", "describe", "live"]
