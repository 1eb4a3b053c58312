# The lab's first process goes on as systemd. Units are installed as docs/service.md says, and nothing else is started.
# LAB_SYSTEMD: a directory with the files of another version (dpkg -x), which take the place of this machine's.
# LAB_DROPIN: lines for a drop-in of memconsole-resume.service, from the second kernel on.
# LAB_HOLD: seconds for which another process has the kernel's device open from the start of the second kernel on.

root=$(dirname "$PYTHONPATH")
bin=$(dirname "$(sed -n 's/^cd [^;]*; \([^ ]*\) .*/\1/p' /run/lab/scenario)")
# One that finds this believes that it is in a container, where a kexec is a cold reboot.
rm -f /.dockerenv
for files in lib usr bin; do
	[ -n "$LAB_SYSTEMD" ] && [ -d "$LAB_SYSTEMD/$files" ] && cp -a "$LAB_SYSTEMD/$files/." "/$files/"
done
rm -rf /lib/systemd/system-generators/* /etc/systemd/system/* /lib/systemd/system/*.wants/*
ln -sf "$bin/memconsole" /usr/bin/memconsole
ln -sf "$root/memconsole/native/bin/memconsole-resume" /usr/bin/memconsole-resume

# Newer ones mount a tmpfs over /tmp, which may be where the project lies.
ln -sf /dev/null /etc/systemd/system/tmp.mount

# docs/service.md
cp "$root"/systemd/memconsole*.service "$root"/systemd/memconsole.socket /etc/systemd/system/
cp "$root"/systemd/memconsole.sysusers /usr/lib/sysusers.d/memconsole.conf
systemd-sysusers memconsole.conf
systemctl enable memconsole-resume.service memconsole.socket memconsole.service

for unit in memconsole memconsole-resume; do
	mkdir -p /etc/systemd/system/$unit.service.d
	printf '[Service]\nStandardOutput=append:/run/lab/%s.log\nStandardError=inherit\n' $unit >/etc/systemd/system/$unit.service.d/log.conf
done
grep -q stage=1 /proc/cmdline || printf '[Service]\n%s\n' "$LAB_DROPIN" >/etc/systemd/system/memconsole-resume.service.d/lab.conf
# As it is shipped, but for history: a Snapshot every second takes half of an emulated processor.
printf 'ExecStart=\n%s --record 30\n' "$(grep ^ExecStart= "$root"/systemd/memconsole.service)" >>/etc/systemd/system/memconsole.service.d/log.conf
cat >/etc/systemd/system/lab.service <<UNIT
[Unit]
After=memconsole.service
[Service]
ExecStart=/bin/sh /run/lab/scenario
Environment=PATH=$PATH PYTHONPATH=$PYTHONPATH PYTHONDONTWRITEBYTECODE=1 HOME=/root LANG=C.UTF-8
StandardOutput=tty
StandardError=inherit
TTYPath=/dev/ttyS0
[Install]
WantedBy=multi-user.target
UNIT
systemctl enable lab.service
grep -q stage=1 /proc/cmdline || [ -z "$LAB_HOLD" ] || (exec 3<>/dev/liveupdate; exec sleep "$LAB_HOLD") &
exec /lib/systemd/systemd --unit=multi-user.target --log-target=console --log-level=notice --show-status=false
