#!/bin/sh
# libvirt's hook of memconsole, called as: NAME OPERATION SUB-OPERATION EXTRA, with the domain's XML on stdin.
#
#   start begin     a domain for which RAM is planned gets it: a link for each block, in the directory libvirt made
#   restore begin   an image that is locked to RAM (<mc:handoff> in its metadata) is refused unless that RAM is here
#   started begin   the guest runs from now on, so the right to restore it is spent
#   release end     the guest ended before it ran: the right is there again
#
# It stands by itself: nothing of memconsole is run, libvirt is not called (it waits for this), and a domain for which
# nothing is planned is left alone, whatever state memconsole is in. docs/libvirt.md has the files it reads.

plans=/run/memconsole/libvirt
settings=/etc/libvirt/qemu.conf
PATH=/usr/sbin:/usr/bin:/sbin:/bin

case "$2-$3" in
restore-begin) ;;
start-begin | started-begin | release-end)
    set -- "$1" "$2" "$plans"/*
    [ -e "$3" ] || exit 0
    ;;
*) exit 0 ;;
esac

name=$1 operation=$2
xml=$(cat)

say() {
    printf 'memconsole: %s\n' "$1" >&2
}

# The first match of a sed expression in the XML.
first() {
    printf '%s\n' "$xml" | sed -n "$1" | head -n 1
}

# Every block's RAM is there; a mount whose server hangs is not waited for.
here() {
    [ -s "$plan" ] || return 1
    while read -r _ block path; do
        timeout -s KILL 5 test -r "$path" || {
            missing=$path
            return 1
        }
    done <"$plan"
}

uuid=$(first "s|.*<uuid>\([0-9a-f]\{8\}-[0-9a-f-]\{27\}\)</uuid>.*|\1|p")
plan=$plans/${uuid:-none}
missing='its plan'

restore() {
    case "$xml" in
    *'<mc:handoff'*) ;;
    *) exit 0 ;;
    esac
    lock=$(first "s|.*<mc:handoff [^>]*digest=[\"']\([0-9a-f]*\)[\"'].*|\1|p")
    right=$(cat "$plan.verified" 2>/dev/null || cat "$plan.restoring" 2>/dev/null)
    if [ -z "$uuid" ] || [ -z "$lock" ] || [ "$lock" != "$right" ]; then
        say "the RAM of $name is not here, or has been in use since this image was made; restoring it is refused (memconsole handoff report; virsh managedsave-remove gives the image up)"
        exit 1
    fi
    if ! here; then
        say "the RAM of $name is not here: $missing cannot be reached; restoring it is refused (memconsole status)"
        exit 1
    fi
    if [ -e "$plan.verified" ] && ! mv "$plan.verified" "$plan.restoring"; then
        say "the RAM of $name cannot be taken: $plan.verified cannot be renamed; restoring it is refused"
        exit 1
    fi
    # What libvirt goes on with has no lock: an image that is saved of the running domain later is like any other.
    printf '%s\n' "$xml" | sed "s|<mc:handoff [^>]*/>||g"
}

# Where libvirt keeps the RAM of this start: memory_backing_dir/libvirt/qemu/ID-NAME, NAME cut short.
ram_directory() {
    id=$(first "s|.*<domain [^>]*id=[\"']\([0-9]*\)[\"'].*|\1|p")
    backing=$(sed -n 's|^[[:space:]]*memory_backing_dir[[:space:]]*=[[:space:]]*"\(.*\)".*|\1|p' "$settings" 2>/dev/null | head -n 1)
    set -- "${backing:-/var/lib/libvirt/qemu/ram}/libvirt/qemu/${id:-none}-"*
    [ $# = 1 ] && [ -d "$1" ] && printf '%s\n' "$1"
}

link() {
    missing='the directory that libvirt makes for RAM in files (memoryBacking of source file)'
    ram=$(ram_directory) && here || return 1
    while read -r _ block path; do
        ln -s "$path" "$ram/$block" || {
            missing="$ram/$block"
            while read -r _ block path; do
                [ ! -L "$ram/$block" ] || rm -f "$ram/$block"
            done <"$plan"
            return 1
        }
    done <"$plan"
}

case "$operation" in
restore) restore ;;
start)
    [ -n "$uuid" ] && [ -e "$plan" ] || exit 0
    if [ -e "$plan.restoring" ]; then
        link && exit 0
        say "the RAM of $name is not here: $missing cannot be reached; restoring it is refused (memconsole status)"
        exit 1
    fi
    # It boots: whatever its RAM held is gone after this.
    rm -f "$plan.verified"
    link || say "$name starts on RAM that memconsole does not hold: $missing cannot be reached (memconsole status)"
    exit 0
    ;;
started)
    [ -z "$uuid" ] || rm -f "$plan.restoring" "$plan.verified"
    ;;
release)
    [ -z "$uuid" ] || [ ! -e "$plan.restoring" ] || mv "$plan.restoring" "$plan.verified"
    ;;
esac
exit 0
