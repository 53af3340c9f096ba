"""One long-lived machine (vmlinux entered by PVH) with everything plugged in: disks, network, vsock, balloon, entropy,
console, QMP, pause, hotplug, and the power button. One boot tests all of it."""
import hashlib
import os
import select
import socket
import subprocess
import threading
import time

from harness import Failure, Machine, Qmp, QmpError, SHELL, pattern_file, run_checked, sha256_of

HOST_ADDRESS, GUEST_ADDRESS = "10.0.5.1", "10.0.5.2"
TRANSFER = 4 << 20
MIB = 1 << 20


def make_tap(name):
    # A first attempt may have left it.
    subprocess.run(["ip", "link", "delete", name], stderr=subprocess.DEVNULL, check=False)
    run_checked("ip", "tuntap", "add", name, "mode", "tap")
    run_checked("ip", "address", "add", f"{HOST_ADDRESS}/24", "dev", name)
    run_checked("ip", "link", "set", name, "up")


class Listener(threading.Thread):
    """Accepts one connection; receives all there is, or sends `data`, or echoes in upper case."""

    def __init__(self, listening, data=None, echo=False):
        super().__init__(daemon=True)
        self.listening = listening
        self.data = data
        self.echo = echo
        self.received = b""
        self.error = None
        self.start()

    def run(self):
        try:
            self.listening.settimeout(60)
            connection, _ = self.listening.accept()
            connection.settimeout(60)
            with connection:
                if self.data is not None:
                    connection.sendall(self.data)
                    connection.shutdown(socket.SHUT_WR)
                parts = []
                while chunk := connection.recv(1 << 16):
                    parts.append(chunk)
                    if self.echo:
                        connection.sendall(chunk.upper())
                self.received = b"".join(parts)
        except OSError as error:
            self.error = error
        finally:
            self.listening.close()

    def result(self, seconds=60):
        self.join(seconds)
        if self.is_alive() or self.error:
            raise Failure(f"the transfer did not end: {self.error or 'still waiting'}")
        return self.received


def tcp_listener():
    listening = socket.create_server((HOST_ADDRESS, 0))
    return listening, listening.getsockname()[1]


def disks(checks, machine, scratch, digest):
    console = machine.console
    checks.equal("the root disk is the Debian file system",
                 console.output_of("sed -n 's/^ID=//p' /etc/os-release"), "debian")
    checks.equal("size of the second disk in the guest",
                 console.output_of("cat /sys/block/vdb/size"), str(os.path.getsize(scratch) // 512))
    checks.equal("what the guest reads is what the file holds",
                 console.output_of(f"dd if=/dev/vdb bs=1M count=4 iflag=direct 2>/dev/null | sha256sum | cut -c1-64"),
                 digest)
    if not machine.context.is_qemu:
        checks.equal("serial number", console.output_of("cat /sys/block/vdb/serial"), "WISP-SCRATCH-1")
    # Written by the guest, flushed, and read from the host's file.
    console.output_of("dd if=/dev/vdb of=/dev/vdb bs=1M count=4 seek=4 conv=notrunc,fsync 2>/dev/null", 60)
    with open(scratch, "rb") as file:
        file.seek(4 * MIB)
        checks.equal("what the guest wrote is in the file", hashlib.sha256(file.read(4 * MIB)).hexdigest(), digest)
    status, _ = console.run("dd if=/dev/zero of=/dev/vdc bs=4k count=1 conv=fsync 2>/dev/null")
    checks.check("a read-only disk refuses writes", status != 0)
    # For the machine that boots from this disk next.
    console.output_of("dd if=/dev/vdb bs=1M count=2 of=/root/kept 2>/dev/null && sync && sha256sum /root/kept >/root/kept.sum && sync", 60)
    machine.context.kept = True


def network(checks, machine):
    console = machine.console
    interface = console.output_of("for i in /sys/class/net/*; do i=${i##*/}; [ $i = lo ] || echo $i; done")
    checks.equal("MAC address", console.output_of(f"cat /sys/class/net/{interface}/address"), "52:54:00:12:34:56")
    console.output_of(f"ip address add {GUEST_ADDRESS}/24 dev {interface} && ip link set {interface} up")
    status, text = console.run(f"ping -c 3 -i 0.2 -W 2 {HOST_ADDRESS}", 20)
    checks.check("ping from guest to host", status == 0, text)

    listening, port = tcp_listener()
    to_host = Listener(listening)
    expected = console.output_of(f"dd if=/dev/vdb bs=1M count={TRANSFER // MIB} 2>/dev/null | sha256sum | cut -c1-64", 60)
    console.output_of(f"dd if=/dev/vdb bs=1M count={TRANSFER // MIB} 2>/dev/null | socat -u - TCP:{HOST_ADDRESS}:{port}", 60)
    checks.equal("TCP from guest to host arrives whole", hashlib.sha256(to_host.result()).hexdigest(), expected)

    data = hashlib.shake_128(b"to the guest").digest(TRANSFER)
    listening, port = tcp_listener()
    from_host = Listener(listening, data=data)
    checks.equal("TCP from host to guest arrives whole",
                 console.output_of(f"socat -u TCP:{HOST_ADDRESS}:{port} - | sha256sum | cut -c1-64", 60),
                 hashlib.sha256(data).hexdigest())
    from_host.result()


def vsock_kernel(checks, machine, cid):
    """vhost-vsock: the host's kernel carries the connections."""
    console = machine.console
    listening = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    listening.bind((socket.VMADDR_CID_ANY, 5000))
    listening.listen()
    server = Listener(listening, echo=True)
    checks.equal("vsock from guest to host and back",
                 console.output_of("echo guest speaks | socat -t 5 - VSOCK-CONNECT:2:5000"), "GUEST SPEAKS")
    server.result()
    mark = console.start("socat VSOCK-LISTEN:5001 EXEC:'tr a-z A-Z'")
    client = connect_when_ready(lambda: vsock_connect(cid, 5001))
    checks.equal("vsock from host to guest and back", talk(client, b"host speaks"), b"HOST SPEAKS")
    console.finish(mark)


def vsock_unix(checks, machine, path):
    """vsock served by the VMM: PATH_PORT is where guests reach the host; `CONNECT PORT` on PATH reaches a guest."""
    console = machine.console
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{path}_5000")
    listening.listen()
    server = Listener(listening, echo=True)
    checks.equal("vsock from guest to host and back",
                 console.output_of("echo guest speaks | socat -t 5 - VSOCK-CONNECT:2:5000"), "GUEST SPEAKS")
    server.result()
    mark = console.start("socat VSOCK-LISTEN:5001 EXEC:'tr a-z A-Z'")
    client = connect_when_ready(lambda: unix_connect(path, 5001))
    checks.equal("vsock from host to guest and back", talk(client, b"host speaks"), b"HOST SPEAKS")
    console.finish(mark)

    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{path}_5002")
    listening.listen()
    bulk = Listener(listening)
    expected = console.output_of("dd if=/dev/vdb bs=1M count=2 2>/dev/null | sha256sum | cut -c1-64")
    console.output_of("dd if=/dev/vdb bs=1M count=2 2>/dev/null | socat -u - VSOCK-CONNECT:2:5002", 60)
    checks.equal("2 MiB through vsock arrive whole", hashlib.sha256(bulk.result()).hexdigest(), expected)


def vsock_connect(cid, port):
    client = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    client.settimeout(10)
    client.connect((cid, port))
    return client


def unix_connect(path, port):
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(path)
    client.sendall(f"CONNECT {port}\n".encode())
    answer = b""
    while not answer.endswith(b"\n"):
        byte = client.recv(1)
        if not byte:
            raise ConnectionRefusedError(f"closed after {answer!r}")
        answer += byte
    if not answer.startswith(b"OK "):
        raise ConnectionRefusedError(answer.decode(errors="replace"))
    return client


def connect_when_ready(connect, seconds=10):
    deadline = time.monotonic() + seconds
    while True:
        try:
            return connect()
        except OSError as error:
            if time.monotonic() > deadline:
                raise Failure(f"cannot connect to the guest: {error}") from error
            time.sleep(0.2)


def talk(client, words):
    with client:
        client.sendall(words)
        client.shutdown(socket.SHUT_WR)
        received = b""
        while chunk := client.recv(4096):
            received += chunk
        return received


def balloon(checks, machine, qmp):
    console = machine.console
    full = qmp("query-balloon")["actual"]
    checks.equal("the balloon starts empty", full, machine_bytes(machine))
    before = free_memory(console)
    qmp("balloon", value=full - 64 * MIB)
    actual = wait_for(lambda: qmp("query-balloon")["actual"], full - 64 * MIB)
    checks.equal("query-balloon after inflating by 64 MiB", actual, full - 64 * MIB)
    after = free_memory(console)
    checks.check("the guest has 64 MiB less", 56 * 1024 < before - after < 72 * 1024, f"{before} kB, then {after} kB")
    checks.equal("BALLOON_CHANGE tells the new size", qmp.event("BALLOON_CHANGE")["data"].keys(), {"actual"})
    qmp("balloon", value=full)
    checks.equal("query-balloon after deflating", wait_for(lambda: qmp("query-balloon")["actual"], full), full)
    again = free_memory(console)
    checks.check("the guest has its memory again", abs(again - before) < 16 * 1024, f"{before} kB, then {again} kB")


def balloon_statistics(checks, machine, qmp):
    if machine.context.is_qemu:
        return
    console = machine.console
    free = lambda: qmp("query-balloon")["statistics"]["stat-free-memory"]
    free()
    time.sleep(0.5)
    before = free()
    console.output_of("mkdir -p /tmp/eaten && mount -t tmpfs none /tmp/eaten && dd if=/dev/zero of=/tmp/eaten/all bs=1M count=64 2>/dev/null")
    free()  # asks; the next one tells
    time.sleep(0.5)
    after = free()
    checks.check("the balloon's statistics follow the guest", before - after > 32 * MIB, f"{before}, then {after} bytes free")
    console.output_of("umount /tmp/eaten")


def free_memory(console):
    """kB. (With deflate-on-oom the balloon's pages stay in MemTotal.) Caches are dropped first, so that they do not count."""
    return int(console.output_of("sync; echo 3 >/proc/sys/vm/drop_caches; awk '/^MemFree/ {print $2}' /proc/meminfo"))


def machine_bytes(machine):
    return int(machine.words[machine.words.index("-m") + 1]) * MIB


def wait_for(question, expected, seconds=10):
    deadline = time.monotonic() + seconds
    while (answer := question()) != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    return answer


def pause(checks, machine, qmp):
    console = machine.console
    console.drain()
    qmp("stop")
    qmp.event("STOP")
    checks.equal("query-status while stopped", qmp("query-status")["status"], "paused")
    mark = console.start("echo still here")
    time.sleep(1.0)
    ready, _, _ = select.select([console.output], [], [], 0)
    checks.check("a stopped guest says nothing", not ready)
    qmp("cont")
    qmp.event("RESUME")
    checks.equal("query-status after cont", qmp("query-status")["status"], "running")
    checks.equal("and goes on after cont", console.finish(mark), (0, "still here"))


def queries(checks, machine, qmp):
    greeting = qmp.greeting.get("QMP", {})
    checks.check("greeting has version and capabilities",
                 isinstance(greeting.get("version", {}).get("qemu", {}).get("major"), int)
                 and isinstance(greeting.get("capabilities"), list), greeting)
    names = {command["name"] for command in qmp("query-commands")}
    wanted = {"qmp_capabilities", "query-version", "query-commands", "query-status", "query-cpus-fast", "query-block",
              "query-chardev", "query-balloon", "balloon", "stop", "cont", "system_powerdown", "system_reset", "quit",
              "device_add", "device_del", "blockdev-add", "blockdev-del", "netdev_add", "netdev_del", "getfd"}
    checks.equal("query-commands names what a client needs", wanted - names, set())
    checks.equal("query-status", qmp("query-status")["status"], "running")
    checks.equal("query-cpus-fast has one entry per CPU", len(qmp("query-cpus-fast")), 1)
    checks.check("query-block names the disks", len(qmp("query-block")) >= 3, qmp("query-block"))
    # Each question, since the program's system-call filter is on by now: a call that is not listed would end it.
    # (QEMU has some that need arguments.)
    unanswered = {}
    for name in sorted(names) if not machine.context.is_qemu else ():
        if name.startswith("query-"):
            try:
                qmp(name)
            except QmpError as error:
                unanswered[name] = str(error)
    checks.equal("every query- command answers", unanswered, {})
    # QEMU serves one client for each -qmp.
    second = qmp if machine.context.is_qemu else Qmp(machine.qmp_path)
    checks.equal("a second client is served", second("query-status")["status"], "running")
    for command, arguments, kind in (("no-such-command", {}, "CommandNotFound"),
                                     ("device_del", {"id": "no-such-device"}, "DeviceNotFound"),
                                     ("balloon", {"value": "much"}, "GenericError")):
        try:
            second(command, **arguments)
            checks.check(f"{command} {arguments} is refused", False, "it was accepted")
        except QmpError as error:
            checks.equal(f"{command} {arguments} is refused", error.kind, kind)
    if second is not qmp:
        second.close()


def hotplug(checks, machine, qmp, file, digest):
    console = machine.console
    before = set(console.output_of("ls /sys/block").split())
    qmp("blockdev-add", **{"node_name_": "hot", "driver": "raw", "file": {"driver": "file", "filename": file}})
    # The end of a device of an iothread takes more than that thread's filter lets through.
    qmp("device_add", driver="virtio-blk-device", id="hot", drive="hot", iothread="io0")
    new = wait_guest_disk(console, before)
    checks.check("a disk added by QMP appears in the guest", bool(new), f"block devices: {sorted(before)}")
    if new:
        checks.equal("and reads right", console.output_of(f"sha256sum /dev/{new} | cut -c1-64", 60), digest)
    qmp("device_del", id="hot")
    event = qmp.event("DEVICE_DELETED", 20)
    checks.equal("DEVICE_DELETED names it", event["data"].get("device"), "hot")
    qmp("blockdev-del", **{"node_name_": "hot"})
    checks.equal("query-status after unplugging", qmp("query-status")["status"], "running")
    checks.equal("the guest still runs", console.run("true")[0], 0)


def hot_back_ends(checks, machine, qmp):
    """Each kind of back end that may be added to a machine that runs, which the system-call filter holds by then."""
    path = machine.context.path
    unix = lambda file, server: {"type": "socket", "data": {"server": server, "addr": {
        "type": "unix", "data": {"path": path(file)}}}}
    switch = socket.socket(socket.AF_UNIX)
    switch.bind(path("switch"))
    switch.listen()
    for name, backend in (("pty", {"type": "pty"}), ("null", {"type": "null"}), ("ringbuf", {"type": "ringbuf"}),
                          ("file", {"type": "file", "data": {"out": path("chr.log")}}),
                          ("listening socket", unix("chr", True)), ("connecting socket", unix("switch", False))):
        answer = qmp("chardev-add", id="hotchr", backend=backend)
        checks.check(f"chardev {name} is added while the machine runs",
                     any(chardev["label"] == "hotchr" for chardev in qmp("query-chardev")))
        if name == "pty":
            os.close(os.open(answer["pty"], os.O_RDWR | os.O_NOCTTY))
        qmp("chardev-remove", id="hotchr")
    try:
        qmp("chardev-add", id="hotchr", backend={"type": "socket", "data": {"server": True, "addr": {
            "type": "inet", "data": {"host": "127.0.0.1", "port": "4321"}}}})
        checks.check("a TCP chardev is refused then", False, "it was accepted")
    except QmpError as error:
        checks.check("a TCP chardev is refused then", "once the machine runs" in str(error), error)

    console = machine.console
    cards = "ls /sys/class/net | grep -vc '^lo$'"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for kind, options in (("tap", {"ifname": "wisptap1"}), ("stream", {"path": path("switch")}), ("dgram", {"fd": "hotfd"})):
        if kind == "dgram":
            qmp("getfd", fdname="hotfd", fds=(ours.fileno(),))
        before = int(console.output_of(cards))  # the guest may keep cards that are gone
        qmp("netdev_add", type=kind, id="hotnet", **options)
        qmp("device_add", driver="virtio-net-device", id="hotcard", netdev="hotnet")
        found = wait_for(lambda: int(console.output_of(cards)), before + 1)
        checks.equal(f"a network card on a {kind} netdev appears in the guest", found, before + 1)
        qmp("device_del", id="hotcard")
        qmp.event("DEVICE_DELETED", 20)
        qmp("netdev_del", id="hotnet")
    for one in (switch, ours, theirs):
        one.close()
    qmp("device_add", driver="virtio-rng-device", id="hotrng", rng="rng0")
    qmp("device_del", id="hotrng")
    qmp.event("DEVICE_DELETED", 20)
    checks.equal("query-status after all of them", qmp("query-status")["status"], "running")


def wait_guest_disk(console, before):
    for attempt in range(10):
        new = set(console.output_of("ls /sys/block").split()) - before
        if new:
            return new.pop()
        if attempt == 5:
            # A guest that is not told of the new device finds it by probing the slots it saw empty.
            console.run("cd /sys/bus/platform/devices; for d in LNRO0005:* virtio-mmio.*; do [ -e $d ] && [ ! -e $d/driver ]"
                        " && echo $d >/sys/bus/platform/drivers/virtio-mmio/bind; done 2>/dev/null; cd /")
        time.sleep(0.3)
    return None


def power_button(checks, machine, qmp):
    """The ACPI button reaches Linux's input layer; the guest answers it by powering off."""
    console = machine.console
    # There may be a sleep button beside it.
    event = console.output_of("for e in /sys/class/input/event*; do"
                              " [ \"$(cat $e/device/name)\" != 'Power Button' ] || echo ${e##*/}; done | head -1")
    checks.check("the guest has a power button", event)
    # struct input_event: 16 bytes of time, then type (EV_KEY 1) and code (KEY_POWER 116).
    # An event that comes before the file is open is lost; the quotes keep the echo of the command from being taken for it.
    console.send(f"exec 3</dev/input/{event} && echo reader''-is-there &&"
                 " dd bs=24 count=1 <&3 2>/dev/null | od -An -tu2 -j16 -N4 && poweroff -f\n")
    console.expect("reader-is-there", 20)
    qmp("system_powerdown")
    checks.check("QMP tells of POWERDOWN", qmp.event("POWERDOWN"))
    console.expect(r"1\s+116", 20)
    checks.check("the power button reaches the guest", True)
    event = qmp.event("SHUTDOWN", 20)
    checks.equal("SHUTDOWN is by the guest", (event["data"]["guest"], event["data"]["reason"]), (True, "guest-shutdown"))
    checks.equal("exit status after power-off", machine.wait(), 0)


def run(checks, context, root_disk):
    scratch, read_only, hot = context.path("scratch.img"), context.path("readonly.img"), context.path("hot.img")
    pattern_file(scratch, 16 * MIB, seed=1)
    pattern_file(read_only, MIB, seed=2)
    hot_digest = pattern_file(hot, 2 * MIB, seed=3)
    digest = sha256_of(scratch, 4 * MIB)
    make_tap("wisptap0")
    vsock_path = context.path("vsock")

    machine = Machine(context, kernel="vmlinux", memory=256,
                      append=f"root=/dev/vda rw {SHELL} wisp.modules=net,vsock,balloon,rng,button")
    machine.disk("rootfs", root_disk, options="direct=off")
    if context.is_qemu:
        machine.disk("scratch", scratch, options="direct=on")
    else:
        machine.add("-object", "iothread,id=io0",
                    "-drive", f"file={scratch},id=scratch,direct=on,aio=io_uring",
                    "-device", "virtio-blk-device,drive=scratch,id=scratch,serial=WISP-SCRATCH-1,iothread=io0")
    machine.disk("readonly", read_only, readonly=True, options="direct=off,aio=threads")
    machine.tap("wisptap0")
    machine.add("-device", "virtio-balloon-device,id=balloon0,deflate-on-oom=on")
    machine.add("-object", "rng-random,id=rng0,filename=/dev/urandom", "-device", "virtio-rng-device,rng=rng0,id=rngdev")
    if context.is_qemu:
        machine.add("-device", "vhost-vsock-device,id=vsock0,guest-cid=33")
    else:
        machine.add("-device", f"virtio-vsock-device,id=vsock0,guest-cid=33,path={vsock_path}")

    with machine:
        machine.start()
        machine.console.wait_shell()
        checks.check("vmlinux by PVH boots Debian to a shell", True)
        qmp = machine.qmp()
        disks(checks, machine, scratch, digest)
        network(checks, machine)
        if context.is_qemu:
            vsock_kernel(checks, machine, 33)
        else:
            vsock_unix(checks, machine, vsock_path)
        checks.equal("bytes from virtio-rng",
                     machine.console.output_of("dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c"), "64")
        balloon(checks, machine, qmp)
        balloon_statistics(checks, machine, qmp)
        pause(checks, machine, qmp)
        queries(checks, machine, qmp)
        if not context.is_qemu:
            hotplug(checks, machine, qmp, hot, hot_digest)
            hot_back_ends(checks, machine, qmp)
        power_button(checks, machine, qmp)
    checks.check("the QMP socket is gone with the machine", not os.path.exists(machine.qmp_path))
