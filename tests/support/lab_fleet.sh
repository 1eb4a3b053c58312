# A lab host of a fleet: a network, the boot files of a disk of its own, what was handed over, an sshd, and the service.
# LAB_NAME: what it is called. LAB_MORE: lines of shell before the service begins.

root=$(dirname "$PYTHONPATH")
bin=$(dirname "$(sed -n 's/^cd [^;]*; \([^ ]*\) .*/\1/p' /run/lab/scenario)")
b=/bin/busybox
ln -sf "$root/memconsole/native/bin/memconsole-resume" /usr/bin/memconsole-resume
ln -sf "$bin/memconsole" /usr/bin/memconsole
memconsole-resume >/run/lab/resume.log 2>&1

$b hostname "$LAB_NAME"
$b ip addr add 127.0.0.1/8 dev lo; $b ip link set lo up
$b ip addr add 10.0.2.15/24 dev eth0; $b ip link set eth0 up; $b ip route add default via 10.0.2.2
$b mount -o bind /run/lab/boot /boot
rm -f /run/lab/serves; uname -r >>/run/lab/boots
mkdir -p /run/sshd
/usr/sbin/sshd -f /run/lab/sshd_config -E /run/lab/sshd.log
eval "$LAB_MORE"
[ -S /run/memconsole/control ] || memconsole serve --record 30 >/run/lab/serve.log 2>&1
: >/run/lab/serves
# The first process waits for whom others left behind.
while :; do $b sleep 5; done
