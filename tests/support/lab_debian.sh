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
. "$(dirname "$PYTHONPATH")/tests/support/lab_sshd.sh"
exec /lib/systemd/systemd --unit=multi-user.target --log-target=console --log-level=notice --show-status=false
