# A lab host of a fleet: a network, the boot files of a disk of its own, what was handed over, an sshd, and the service.
# LAB_NAME: what it is called. LAB_MORE: lines of shell before the service begins.

root=$(dirname "$PYTHONPATH")
bin=$(dirname "$(sed -n 's/^cd [^;]*; \([^ ]*\) .*/\1/p' /run/lab/scenario)")
b=/bin/busybox
ln -sf "$root/memconsole/native/bin/memconsole-resume" /usr/bin/memconsole-resume
ln -sf "$bin/memconsole" /usr/bin/memconsole
memconsole-resume >/run/lab/resume.log 2>&1

. "$root/tests/support/lab_sshd.sh"
eval "$LAB_MORE"
[ -S /run/memconsole/control ] || memconsole serve --record 30 >/run/lab/serve.log 2>&1
: >/run/lab/serves
# The first process waits for whom others left behind.
while :; do $b sleep 5; done
