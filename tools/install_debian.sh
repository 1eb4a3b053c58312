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
want mke2fs e2fsprogs
want qemu-ga qemu-guest-agent
want lintian lintian
want /bin/busybox busybox-static
want systemctl systemd
want libvirtd libvirt-daemon-system
want virsh libvirt-clients
want zsh zsh
want fish fish
want ssh openssh-client
want sshd openssh-server
python3 -c 'import venv, ensurepip' 2>/dev/null || lacking+=(python3-venv)
if ((${#lacking[@]})); then
	apt-get update -q
	apt-get install -y -q --no-install-recommends "${lacking[@]}"
fi

# The tests start their own memcached: what its package would start is not wanted.
if ! command -v memcached >/dev/null 2>&1; then
	policy=/usr/sbin/policy-rc.d made=
	[[ -e $policy ]] || { printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy" && made=$policy; }
	apt-get update -q
	apt-get install -y -q --no-install-recommends memcached
	[[ -z $made ]] || rm -f "$made"
fi

# Prometheus's own checker of metrics, without the server that its package would start.
if ! command -v promtool >/dev/null 2>&1; then
	debs=$(mktemp -d)
	apt-get update -q
	(cd "$debs" && apt-get download prometheus && dpkg -x prometheus_*.deb .)
	install -m 755 "$debs/usr/bin/promtool" /usr/local/bin/
	rm -rf "$debs"
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

# The lab's hosts run under this machine's systemd, under one whose fd store has custody (254) and under one that carries
# fd stores over a kexec (261). Those that this machine lacks are unpacked beside its own, nothing is installed: what suites
# have moves on, so the versions are the newest there, and the tests say which they met.
mirror_of() {
	apt-get indextargets --format '$(SITE) $(RELEASE)' 'Created-By: Packages' | awk -v suite="$1" '$2 == suite {print $1; exit}'
}
unpacked() { # directory suite least-version package...: the version is that of the first one
	local cache=${XDG_CACHE_HOME:-$HOME/.cache}/memconsole/lab/$1 suite=$2 least=$3 work version
	shift 3
	[[ -e $cache/version ]] && return
	work=$(mktemp -d)
	mkdir -p "$work"/{lists,archives}/partial "$work/files"
	echo "deb $(mirror_of "$codename") $suite main" >"$work/sources.list"
	local apt=(-q -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
		-o "Dir::State::lists=$work/lists" -o "Dir::Cache::archives=$work/archives" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=
		-o APT::Sandbox::User=root)
	if apt-get "${apt[@]}" update >/dev/null && (cd "$work" && apt-get "${apt[@]}" download "${@/%//$suite}" >/dev/null); then
		version=$(dpkg-deb -f "$work/$1"_*.deb Version)
		if ((${version%%[.-]*} >= least)); then
			for deb in "$work"/*.deb; do dpkg -x "$deb" "$work/files"; done
			rm -rf "$cache" && mkdir -p "${cache%/*}" && mv "$work/files" "$cache"
			echo "$version" >"$cache/version"
		else
			echo "install_debian.sh: $suite has $1 $version, $least is wanted" >&2
		fi
	else
		echo "install_debian.sh: $1 of $suite cannot be had; the tests go without" >&2
	fi
	rm -rf "$work"
}
codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
ours=$(systemctl --version 2>/dev/null | sed -n '1s/systemd \([0-9]*\).*/\1/p')
((${ours:-0} >= 254)) || unpacked systemd "$codename-backports" 254 systemd libsystemd-shared
((${ours:-0} >= 261)) || unpacked systemd-newest testing 261 systemd libsystemd-shared libsystemd0

# A newer libvirt with the libraries that it is built against, which the tests lay over this machine's, in a mount namespace.
libvirt=$(libvirtd --version 2>/dev/null | sed -n 's/.* \([0-9]*\)\..*/\1/p')
((${libvirt:-0} >= 11)) || unpacked libvirt-newest trixie 11 libvirt0 libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients libvirt-daemon-log \
	libvirt-daemon-common libvirt-common libc6 libgnutls30t64 libxml2 libtirpc3t64 libnettle8t64 libhogweed6t64 libsystemd0 libselinux1 libglib2.0-0t64 \
	libjson-c5 libcap-ng0 libblkid1 libmount1 libnuma1 libudev1 libdevmapper1.02.1 libreadline8t64 libsasl2-2 libacl1 libpciaccess0 libssh-4 libunistring5 \
	libssl3t64
