"""The Debian package: lintian says nothing of it, and it works where it is installed, which is a root of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import build_deb
import pytest
from support.playbooks import environment

import memconsole

LINTIAN = shutil.which("lintian")
BEHIND = """
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/new" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/new,workdir=$1/work" "$1/root"
mount -t proc proc "$1/root/proc"
mount --rbind /sys "$1/root/sys"
mount --rbind /dev "$1/root/dev"
mount -t tmpfs tmpfs "$1/root/run"
cp "$2" "$1/root/run/it.deb"
exec chroot "$1/root" /bin/sh -ec "$3"
"""
"""In a root that is this one with all changes in memory: a mount, and process, namespace of its own."""
USED = """
dpkg --force-depends --install /run/it.deb >&2
dpkg --verify memconsole >&2
test -x /usr/bin/memconsole-resume
grep -q '^memconsole:' /etc/group
grep -q '^memconsole-view:' /etc/group
man -w memconsole memconsole-resume >&2 || test -s /usr/share/man/man1/memconsole.1.gz
cd /tmp
/usr/lib/memconsole/bin/python3 -P -c "import memconsole.views.app"
memconsole serve
memconsole reserve web 8M >&2
memconsole handoff check --json >/run/conditions.json || test $? = 3
memconsole snapshot
memconsole release web --yes >&2
dpkg --remove memconsole >&2
test ! -e /usr/lib/memconsole/bin
"""
BY_THE_ROLE = """
mkdir -p /run/home
touch /run/home/none.cfg
cd /tmp
for _ in 1 2; do
    {play} -i hv1, -c local --tags package -e memconsole_hosts=all -e memconsole_package=/run/it.deb \\
        -e ansible_python_interpreter=/usr/bin/python3 memconsole.fleet.install
done
dpkg --verify memconsole >&2
/usr/bin/memconsole --version >&2
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_deb.build(tmp_path_factory.mktemp("deb"))


def test_it_has_units_groups_pages_and_completions(package: Path) -> None:
    said = subprocess.run(["dpkg-deb", "--contents", str(package)], capture_output=True, text=True, check=True).stdout
    names = {line.split()[5].removeprefix("./") for line in said.splitlines()}
    assert {f"usr/lib/systemd/system/{name}" for name in ("memconsole.service", "memconsole.socket")} <= names
    assert {"usr/bin/memconsole", "usr/bin/memconsole-resume", "usr/lib/sysusers.d/memconsole.conf"} <= names
    assert {"usr/share/man/man1/memconsole.1.gz", "usr/share/man/man1/memconsole-resume.1.gz"} <= names
    assert {"usr/share/bash-completion/completions/memconsole", "usr/share/zsh/vendor-completions/_memconsole"} <= names
    assert not [name for name in names if {"__pycache__", "ansible", "pytest", "mypy"} & set(name.split("/"))]
    assert {line.split()[1] for line in said.splitlines()} == {"root/root"}
    field = subprocess.run(["dpkg-deb", "-f", str(package), "Version"], capture_output=True, text=True, check=True)
    assert field.stdout.strip() == memconsole.__version__


@pytest.mark.skipif(LINTIAN is None, reason="lintian is not installed")
def test_lintian_says_nothing_of_it(package: Path) -> None:
    words = [str(LINTIAN), "--allow-root", "--fail-on", "error,warning", str(package)]
    said = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout) == (0, "")


def behind(directory: Path, package: Path, script: str) -> str:
    """What a script writes that runs in a root of its own."""
    words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "/bin/sh", "-c", BEHIND, "sh"]
    env = environment(Path("/run/home"))
    said = subprocess.run(
        [*words, str(directory), str(package), script], capture_output=True, text=True, check=False, cwd="/", env=env
    )
    assert said.returncode == 0, (said.stdout, said.stderr)
    return said.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a root of its own: root")
def test_it_is_installed_used_and_removed(package: Path, tmp_path: Path) -> None:
    shown = json.loads(behind(tmp_path, package, USED))
    assert [(each["name"], each["size"]) for each in shown["regions"]] == [("web", 8 << 20)]
    assert not Path("/usr/lib/memconsole").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a root of its own: root")
def test_the_role_installs_it_once(package: Path, tmp_path: Path) -> None:
    play = Path(sys.executable).parent / "ansible-playbook"
    said = behind(tmp_path, package, BY_THE_ROLE.format(play=play))
    counted = [int(count) for count in re.findall(r"^hv1 .* changed=(\d+) .* failed=0 ", said, flags=re.MULTILINE)]
    assert (counted[0] > 0, counted[1:]) == (True, [0]), said
