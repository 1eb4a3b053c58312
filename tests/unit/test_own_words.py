"""Which of libvirt's own words for a QEMU can be said again, and which by name cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from memconsole.backend.handoff import own_words
from memconsole.backend.handoff.own_words import Words

DIRECTORY = "/var/lib/libvirt/qemu/domain-1-web"
AGENT = "/var/lib/libvirt/qemu/channel/target/domain-1-web/org.qemu.guest_agent.0"
SECRET = {"qom-type": "secret", "id": "masterKey0", "format": "raw", "file": f"{DIRECTORY}/master-key.aes"}
MEMFD = {"qom-type": "memory-backend-memfd", "id": "pc.ram", "share": True, "seal": False, "size": 33554432}
DISK = {"driver": "file", "filename": "/images/web,1.img", "node-name": "libvirt-1-storage", "discard": "unmap"}
FORMAT = {"node-name": "libvirt-1-format", "driver": "raw", "file": "libvirt-1-storage"}
RANDOM = {"qom-type": "rng-random", "id": "objrng0", "filename": "/dev/urandom"}
WORDS = [
    "/usr/bin/qemu-system-x86_64",
    *("-name", "guest=web,debug-threads=on", "-S", "-object", json.dumps(SECRET)),
    *("-machine", "pc-q35-10.0,usb=off,memory-backend=pc.ram", "-accel", "kvm", "-m", "32"),
    *("-object", json.dumps(MEMFD), "-smp", "2", "-uuid", "d0941c44", "-nodefaults"),
    *("-chardev", "socket,id=charmonitor,fd=27,server=on,wait=off", "-mon", "chardev=charmonitor,id=monitor"),
    *("-no-shutdown", "-blockdev", json.dumps(DISK), "-blockdev", json.dumps(FORMAT)),
    *("-device", json.dumps({"driver": "virtio-blk-pci", "drive": "libvirt-1-format", "id": "virtio-disk0"})),
    *("-netdev", json.dumps({"type": "user", "id": "hostnet0"})),
    *("-device", json.dumps({"driver": "virtio-net-pci", "netdev": "hostnet0", "id": "net0"})),
    *("-add-fd", "set=0,fd=24,opaque=serial0-log"),
    *("-chardev", "pty,id=charserial0,logfile=/dev/fdset/0,logappend=on"),
    *("-device", json.dumps({"driver": "isa-serial", "chardev": "charserial0", "id": "serial0"})),
    *("-chardev", "socket,id=charchannel0,fd=25,server=on,wait=off", "-incoming", "defer"),
    *("-device", json.dumps({"driver": "virtserialport", "chardev": "charchannel0", "id": "channel0"})),
    *("-vnc", "127.0.0.1:0,audiodev=audio1", "-audiodev", json.dumps({"id": "audio1", "driver": "none"})),
    *("-object", json.dumps(RANDOM), "-sandbox", "on,spawn=deny", "-msg", "timestamp=on"),
]
STATUS = f"""<domstatus state='running' reason='booted' pid='1732'>
  <monitor path='{DIRECTORY}/monitor.sock' type='unix'/>
  <namespaces><mount/></namespaces>
  <devices><device alias='virtio-disk0'/><device alias='net0'/><device alias='serial0'/></devices>
  <libDir path='{DIRECTORY}'/>
  <channelTargetDir path='/var/lib/libvirt/qemu/channel/target/domain-1-web'/>
  <domain type='kvm' id='1'>
    <devices>
      <disk type='file' device='disk'>
        <source file='/images/web,1.img' index='1'><privateData><nodenames>
          <nodename type='storage' name='libvirt-1-storage'/><nodename type='format' name='libvirt-1-format'/>
        </nodenames></privateData></source>
      </disk>
      <serial type='pty'><source path='/dev/pts/0'/><log file='/log/a,b'/><alias name='serial0'/></serial>
      <channel type='unix'><source mode='bind' path='{AGENT}'/><alias name='channel0'/></channel>
      <graphics type='vnc' port='5900'/>
    </devices>
    <seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+64055</label></seclabel>
  </domain>
</domstatus>"""


def again(words: list[str] = WORDS, status: str = STATUS) -> Words:
    found = Words(own_words.noted(ElementTree.fromstring(status)), {"pc.ram": 3})
    found.take(words)
    return found


def value_of(found: Words, option: str, about: str) -> str:
    each = zip(found.said, found.said[1:], strict=False)
    return next(value for word, value in each if word == option and about in value)


def test_libvirts_words_are_said_again_with_what_its_numbers_were() -> None:
    found = again()
    assert found.unsayable == []
    ram = json.loads(value_of(found, "-object", "pc.ram"))
    assert ram == {
        "qom-type": "memory-backend-file",
        "id": "pc.ram",
        "share": True,
        "size": 33554432,
        "mem-path": "/proc/self/fd/3",
    }
    assert value_of(found, "-chardev", "charmonitor") == (
        f"socket,id=charmonitor,server=on,wait=off,path={DIRECTORY}/monitor.sock"
    )
    assert value_of(found, "-chardev", "charchannel0").endswith(f",path={AGENT}")
    assert value_of(found, "-chardev", "charserial0") == "pty,id=charserial0,logfile=/log/a,,b,logappend=on"
    assert not {"-add-fd", "-incoming"} & set(found.said)
    others = [word for word in WORDS if word not in found.said]
    assert len(others) == 8  # the RAM, three chardevs, and what is left out with its value
    assert "fd=" not in "".join(found.said)


def test_what_was_said_again_is_said_again_the_same_way() -> None:
    once = again()
    assert again(once.said).said == once.said
    assert again(once.said).unsayable == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["-netdev", '{"type":"tap","fd":"30","vhost":true,"vhostfd":"31","id":"hostnet1"}'], "network tap"),
        (["-netdev", "stream,id=hostnet1,addr.type=unix"], "network stream"),
        (["-device", '{"driver":"vfio-pci","host":"0000:01:00.0","id":"hostdev0"}'], "device vfio-pci"),
        (["-device", "vhost-vsock-pci,id=vsock0,guest-cid=3,vhostfd=28"], "device vhost-vsock-pci"),
        (["-tpmdev", "emulator,id=tpm-tpm0,chardev=chrtpm"], "option -tpmdev"),
        (["-chardev", "socket,id=chrtpm,path=/run/swtpm.sock"], "socket chrtpm, which is another's"),
        (["-chardev", "spicevmc,id=charchannel1,name=vdagent"], "character device spicevmc"),
        (["-chardev", "file,id=charserial1,path=/dev/fdset/1"], "character device file"),
        (["-fsdev", "local,id=fsdev-fs0,path=/srv"], "option -fsdev"),
        (["-spice", "port=5900"], "option -spice"),
        (["-vnc", "127.0.0.1:1,password=on"], "a screen (vnc) with more than an address"),
        (["-vnc", "unix:/run/vnc.sock"], "a screen (vnc) with more than an address"),
        (["-audiodev", '{"id":"audio2","driver":"dbus"}'], "sound by dbus"),
        (["-display", "dbus,p2p=on"], "display dbus,p2p=on"),
        (["-object", '{"qom-type":"memory-backend-memfd","id":"memdimm0","size":1}'], "not in custody (memdimm0)"),
        (["-object", '{"qom-type":"tls-creds-x509","id":"tls0"}'], "object tls-creds-x509"),
        (["-object", '{"qom-type":"secret","id":"s0","file":"/etc/secret"}'], "secret s0 of a file"),
        (["-object", '{"qom-type":"rng-random","id":"r","filename":"/dev/hwrng"}'], "object rng-random"),
        (["-blockdev", '{"driver":"host_device","filename":"/dev/vg/lv","node-name":"a"}'], "disk by host_device"),
        (["-blockdev", '{"driver":"file","filename":"/dev/fdset/3","node-name":"a"}'], "disk /dev/fdset/3"),
        (["-blockdev", '{"driver":"rbd","node-name":"a"}'], "disk by rbd"),
        (["-kernel", "/dev/mapper/kernel"], "a device of the host"),
        (["-qmp", "unix:/run/qmp,server"], "option -qmp"),
        (["-readconfig"], "option -readconfig"),
        (["stray"], "word stray"),
    ],
)
def test_what_cannot_be_given_back_is_named(words: list[str], named: str) -> None:
    assert any(named in each for each in again([*WORDS, *words]).unsayable)


def without(old: str, new: str = "") -> Callable[[], str]:
    def changed() -> str:
        assert old in STATUS
        return STATUS.replace(old, new)

    return changed


@pytest.mark.parametrize(
    ("status", "named"),
    [
        (without("<libDir", "<numad nodeset='0'/><libDir"), "libvirt notes numad"),
        (without("<domain type='kvm' id='1'>", "<domain><cputune/>"), "limits or pinning of its processors"),
        (without("<graphics", "<hostdev/><graphics"), "a device of the host"),
        (without("port='5900'", "port='5900' passwd='x'"), "a password of its screen"),
        (without("model='dac'", "model='apparmor'"), "a label of apparmor"),
        (without("<device alias='net0'/>", "<device alias='net0'/><device alias='net1'/>"), "since it started (net1)"),
        (without("/images/web,1.img", "/images/web.snap"), "disks that changed"),
        (without("name='libvirt-1-format'", "name='libvirt-2-format'"), "disks that changed"),
        (without("<log file='/log/a,b'/>"), "the log of charserial0"),
    ],
)
def test_what_libvirt_made_beside_qemu_or_changed_since_is_named(status: Callable[[], str], named: str) -> None:
    assert any(named in each for each in again(status=status()).unsayable)


def test_ram_that_the_words_do_not_have_is_named() -> None:
    found = Words(own_words.noted(ElementTree.fromstring(STATUS)), {"pc.ram": 3, "memdimm0": 4})
    found.take(WORDS)
    assert found.unsayable == ["RAM that its words do not have (memdimm0)"]
    bound = json.dumps({**MEMFD, "host-nodes": [0], "policy": "bind"})
    words = [bound if word == json.dumps(MEMFD) else word for word in WORDS]
    assert again(words).unsayable == ["RAM bound to NUMA nodes"]
