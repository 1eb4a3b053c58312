# A lab host that is a Debian with systemd and an sshd, and of memconsole has what is installed on its disk.
# LAB_NAME: what it is called.

b=/bin/busybox
if [ ! -e /var/lib/begun ]; then
	# One that finds this believes that it is in a container.
	rm -f /.dockerenv
	rm -rf /lib/systemd/system-generators/* /etc/systemd/system/* /lib/systemd/system/*.wants/*
	# The project may lie below it.
	ln -sf /dev/null /etc/systemd/system/tmp.mount
	printf '[Service]\nType=oneshot\nExecStart=/bin/touch /run/lab/serves\n' >/etc/systemd/system/lab.service
	mkdir -p /etc/systemd/system/multi-user.target.wants
	ln -s ../lab.service /etc/systemd/system/multi-user.target.wants/lab.service
	: >/var/lib/begun
fi
$b hostname "$LAB_NAME"
$b ip addr add 127.0.0.1/8 dev lo; $b ip link set lo up
$b ip addr add 10.0.2.15/24 dev eth0; $b ip link set eth0 up; $b ip route add default via 10.0.2.2
$b mount -o bind /run/lab/boot /boot
rm -f /run/lab/serves; uname -r >>/run/lab/boots
mkdir -p /run/sshd
/usr/sbin/sshd -f /run/lab/sshd_config -E /run/lab/sshd.log
exec /lib/systemd/systemd --unit=multi-user.target --log-target=console --log-level=notice --show-status=false
