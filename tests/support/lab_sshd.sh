# What every lab host of a fleet has once its first process runs: a name, a network, a /boot of its own, an sshd.
# b: a busybox. LAB_NAME: what it is called.

$b hostname "$LAB_NAME"
$b ip addr add 127.0.0.1/8 dev lo; $b ip link set lo up
$b ip addr add 10.0.2.15/24 dev eth0; $b ip link set eth0 up; $b ip route add default via 10.0.2.2
$b mount -o bind /run/lab/boot /boot
rm -f /run/lab/serves; uname -r >>/run/lab/boots
mkdir -p /run/sshd
/usr/sbin/sshd -f /run/lab/sshd_config -E /run/lab/sshd.log
