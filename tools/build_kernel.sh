#!/usr/bin/env bash
# Build the lab's kernel from Debian's newest linux-source, with tests/vm/kernel.config upon tinyconfig:
#
#   build_kernel.sh DIRECTORY       leaves DIRECTORY/bzImage and the kernel.config it was made with
#
# Apt's own sources and lists stay as they are: what is asked for here has a configuration of its own. The source and the
# objects stay in DIRECTORY/build until the kernel is there, so that a build that was interrupted goes on where it was.
# Wants about 3 GiB of disk; half an hour on two cores.
set -euo pipefail

config=$(realpath "$(dirname "$0")/../tests/vm/kernel.config")
suites=(trixie-backports stable-backports testing unstable)
oldest=7.0

fail() { printf 'build_kernel: %s\n' "$@" >&2 && exit 1; }

(($# == 1)) || { echo "usage: build_kernel.sh DIRECTORY" >&2 && exit 2; }
mkdir -p "$1"
cd "$1"
lab=$PWD
exec 9>lock
flock -n 9 || fail "another build is at work in $lab"

# --- tools

lacking=()
for pair in gcc:gcc make:make bc:bc flex:flex bison:bison xz:xz-utils perl:perl cpio:cpio; do
	command -v "${pair%%:*}" >/dev/null || lacking+=("${pair#*:}")
done
for pair in libelf.h:libelf-dev openssl/evp.h:libssl-dev; do
	echo "#include <${pair%%:*}>" | gcc -E - >/dev/null 2>&1 || lacking+=("${pair#*:}")
done
if ((${#lacking[@]})); then
	((EUID == 0)) || fail "these packages are lacking: ${lacking[*]}" "install them: sudo apt-get install ${lacking[*]}"
	apt-get update -q
	DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${lacking[@]}"
fi
free=$(df --output=avail -k . | tail -1)
((free > 3 * 1024 * 1024)) || fail "$lab has $((free / 1024)) MiB free, and the build wants 3 GiB" \
	"free some, or set XDG_CACHE_HOME to a place that has more"

# --- source

codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
mirror=$(apt-get indextargets --format '$(SITE) $(RELEASE)' 'Created-By: Packages' |
	awk -v suite="$codename" '$2 == suite {print $1; exit}')
[[ -n $mirror ]] || fail "apt has no source of the suite '$codename' (/etc/apt/sources.list.d): Debian is wanted"

# Apt's options for one suite alone, in a directory of its own.
apt=()
asking() {
	local at=$lab/build/apt/$1
	mkdir -p "$at/lists/partial" "$at/cache/archives/partial"
	echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $1 main" >"$at/sources.list"
	apt=(-q -o "Dir::Etc::SourceList=$at/sources.list" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$at/lists"
		-o "Dir::Cache=$at/cache" -o APT::Sandbox::User="$(id -un)")
}

# Lines of version, package, suite.
offered() {
	local suite
	for suite in "${suites[@]}"; do
		asking "$suite"
		if ! apt-get "${apt[@]}" update >build/apt/log 2>&1; then
			echo "build_kernel: no suite $suite: $(grep -m 1 '^[EW]:' build/apt/log)" >&2
			continue
		fi
		apt-cache "${apt[@]}" search --names-only '^linux-source-[0-9.]+$' | while read -r package _; do
			apt-cache "${apt[@]}" show --no-all-versions "$package" |
				awk -v package="$package" -v suite="$suite" '/^Version:/ {print $2, package, suite}'
		done
	done
}

echo "build_kernel: looking for the newest linux-source in ${suites[*]}"
newest=$(offered | grep -v '~rc' | sort -V | tail -1)
read -r version package suite <<<"$newest"
[[ -n $newest && $(printf '%s\n' "$oldest" "$version" | sort -V | head -1) == "$oldest" ]] ||
	fail "no suite offers linux-source >= $oldest (the newest is ${version:-none})"
tree=build/$version
if [[ ! -d $tree ]]; then
	echo "build_kernel: $package $version from $suite"
	rm -rf build/[0-9]* build/part && mkdir build/part
	asking "$suite"
	(cd build/part && apt-get "${apt[@]}" download "$package=$version" && dpkg-deb -x ./*.deb . && rm ./*.deb)
	tar -C build/part -xf "build/part/usr/src/$package.tar.xz"
	mv "build/part/$package" "$tree"
	rm -rf build/part
fi

# --- kernel

logged() { # what it is, then a command whose output matters only when it fails
	local what=$1
	shift
	"$@" >build/log 2>&1 || { tail -20 build/log >&2 && fail "$what failed; all of it is in $lab/build/log"; }
}

switched_on() { sed -n 's/^\(CONFIG_[A-Z0-9_]*\)=.*/\1/p' "$1" | sort -u; }

wanted=$(switched_on "$config")
unwanted=$(sed -n 's/^# \(CONFIG_[A-Z0-9_]*\) is not set$/\1/p' "$config" | sort -u)
logged "tinyconfig" make -C "$tree" tinyconfig
logged "the merge of $config" bash -c "cd $tree && scripts/kconfig/merge_config.sh -m .config $config"
logged "olddefconfig" make -C "$tree" olddefconfig
lost=$(comm -23 <(echo "$wanted") <(switched_on "$tree/.config") && comm -12 <(echo "$unwanted") <(switched_on "$tree/.config"))
[[ -z $lost ]] || fail "this kernel does not take: ${lost//$'\n'/ }" "mend tests/vm/kernel.config"
echo "build_kernel: compiling on $(nproc) CPUs; that takes a while"
logged "the build" make -C "$tree" -j "$(nproc)" bzImage
cp "$tree/arch/x86/boot/bzImage" bzImage.part
cp "$config" kernel.config
mv bzImage.part bzImage
rm -rf build
echo "build_kernel: $lab/bzImage is $package $version"
