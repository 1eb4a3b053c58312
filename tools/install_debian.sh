#!/usr/bin/env bash
# Install what the tests want and a fresh Debian lacks; QEMU from backports where the suite's own is too old to carry guests.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive

lacking=()
want() { command -v "$1" >/dev/null 2>&1 || lacking+=("$2"); }
want gcc gcc
want make make
want git git
want python3 python3
want lspci pciutils
want tmux tmux
want dtc device-tree-compiler
want zstd zstd
want /bin/busybox busybox-static
want systemctl systemd
python3 -c 'import venv, ensurepip' 2>/dev/null || lacking+=(python3-venv)
if ((${#lacking[@]})); then
	apt-get update -q
	apt-get install -y -q --no-install-recommends "${lacking[@]}"
fi

# cpr-reboot, by which a QEMU guest is carried through a handoff, came with QEMU 8.2.
qemu_version() { qemu-system-x86_64 --version 2>/dev/null | sed -n 's/.*version \([0-9]*\)\.\([0-9]*\).*/\1 \2/p'; }
enough() { (($1 > 8 || ($1 == 8 && $2 >= 2))); }
read -r major minor _ <<<"$(qemu_version) 0 0"
if ! enough "$major" "$minor"; then
	codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
	mirror=$(apt-get indextargets --format '$(SITE) $(RELEASE)' 'Created-By: Packages' | awk -v suite="$codename" '$2 == suite {print $1; exit}')
	echo "deb $mirror $codename-backports main" >/etc/apt/sources.list.d/memconsole-backports.list
	apt-get update -q
	apt-get install -y -q --no-install-recommends -t "$codename-backports" qemu-system-x86 ||
		apt-get install -y -q --no-install-recommends qemu-system-x86
fi

# The lab's hosts run under systemd; one whose fd store has custody (254) comes from backports, beside this machine's own.
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")-backports
ours=$(systemctl --version 2>/dev/null | sed -n '1s/systemd \([0-9]*\).*/\1/p')
cache=${XDG_CACHE_HOME:-$HOME/.cache}/memconsole/lab/systemd
if ((${ours:-0} < 254)) && [[ ! -x $cache/lib/systemd/systemd ]]; then
	debs=$(mktemp -d) && mkdir -p "$cache"
	if (cd "$debs" && apt-get download "systemd/$suite" "libsystemd-shared/$suite" >/dev/null 2>&1); then
		for deb in "$debs"/*.deb; do dpkg -x "$deb" "$cache"; done
	fi
	rm -rf "$debs"
fi
