"""Wrong input from the user: one line that says what, where and what to do; exit status 2; nothing left behind."""
import os
import socket
import subprocess
import time

from harness import die_with_parent


def refused(checks, context, name, words, mentions, before=None):
    """Runs the VMM with `words`, which it must refuse in one line that holds every text of `mentions`."""
    qmp = context.unique("refused-qmp")
    base = ["-accel", context.accel, "-serial", "stdio"]
    for option in (["-machine", "microvm"], ["-m", "128"], ["-qmp", f"unix:{qmp},server,nowait"]):
        if option[0] not in words:
            base += option
    started = time.monotonic()
    try:
        result = subprocess.run([context.vmm] + base + words, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                                timeout=20 * context.patience, check=False, preexec_fn=die_with_parent)
    except subprocess.TimeoutExpired:
        checks.check(name, False, "it still runs")
        return
    took = time.monotonic() - started
    lines = result.stderr.strip().splitlines()
    problems = []
    if result.returncode != 2:
        problems.append(f"exit status {result.returncode}, not 2")
    if len(lines) != 1:
        problems.append(f"{len(lines)} lines on standard error, not one")
    problems += [f"no '{text}' in the message" for text in mentions if text not in result.stderr]
    if result.stdout:
        problems.append(f"output: {result.stdout[:200]!r}")
    if os.path.exists(qmp):
        problems.append("the QMP socket was left behind")
    if took > 5 * context.patience:
        problems.append(f"took {took:.1f} s")
    checks.check(name, not problems, "; ".join(problems) + f"\n{result.stderr.strip()}")


def run(checks, context):
    kernel = context.image("vmlinux")
    good = ["-kernel", kernel, "-initrd", context.image("initrd.img")]
    truncated = context.path("truncated")
    with open(kernel, "rb") as source, open(truncated, "wb") as target:
        target.write(source.read(1 << 20))
    nothing = context.path("empty")
    open(nothing, "wb").close()
    text = context.path("text")
    with open(text, "w", encoding="ascii") as file:
        file.write("This is no kernel.\n" * 400)
    huge = context.path("huge-initrd")
    with open(huge, "wb") as file:
        file.truncate(1 << 30)
    disk = context.path("bad-disk.img")
    with open(disk, "wb") as file:
        file.truncate(1 << 20)
    odd = context.path("odd.img")
    with open(odd, "wb") as file:
        file.truncate(100)
    busy = context.path("busy-socket")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(busy)
    listening.listen()
    folder = context.path("folder")
    os.mkdir(folder)

    def drive(value, device="drive=d0,id=d0"):
        return good + ["-drive", value, "-device", f"virtio-blk-device,{device}"]

    cases = [
        ("a kernel that does not exist", ["-kernel", "/no/such/kernel"], ["/no/such/kernel"]),
        ("a kernel that is a folder", ["-kernel", folder], [folder]),
        ("an empty kernel", ["-kernel", nothing], [nothing]),
        ("a kernel cut short", ["-kernel", truncated], [truncated]),
        ("an initrd that does not exist", ["-kernel", kernel, "-initrd", "/no/such/initrd"], ["/no/such/initrd"]),
        ("an initrd that does not fit", ["-kernel", kernel, "-initrd", huge], [huge]),
        ("a disk that does not exist", drive("file=/no/such/disk,id=d0"), ["/no/such/disk"]),
        ("a disk that is a folder", drive(f"file={folder},id=d0"), [folder]),
        ("a disk smaller than a sector", drive(f"file={odd},id=d0"), [odd]),
        ("a drive that no -drive defines", good + ["-device", "virtio-blk-device,drive=none,id=d0"], ["none"]),
        ("two drives with one id", drive(f"file={disk},id=d0") + ["-drive", f"file={disk},id=d0"], ["d0"]),
        ("two devices with one id", drive(f"file={disk},id=d0") + ["-device", "virtio-balloon-device,id=d0"], ["d0"]),
        ("an unknown option", good + ["-no-such-option"], ["no-such-option"]),
        ("an unknown sub-option", drive(f"file={disk},id=d0,colour=red"), ["colour"]),
        ("an unknown device", good + ["-device", "virtio-toaster-device,id=t"], ["virtio-toaster-device"]),
        ("memory that is no number", good + ["-m", "much"], ["much"]),
        ("no memory at all", good + ["-m", "0"], ["0"]),
        ("no CPU at all", good + ["-smp", "0"], ["0"]),
        ("an unknown machine", good + ["-machine", "pentium"], ["pentium"]),
        ("a socket in use", good + ["-qmp", f"unix:{busy},server,nowait"], [busy]),
        ("a socket in no folder", good + ["-qmp", "unix:/no/such/folder/s,server,nowait"], ["/no/such/folder"]),
        ("a tap that does not exist and cannot be made",
         good + ["-netdev", "tap,id=n,ifname=a-name-that-is-far-too-long", "-device", "virtio-net-device,netdev=n,id=n"],
         ["a-name-that-is-far-too-long"]),
        ("a MAC address that is none", good + ["-netdev", "tap,id=n,ifname=wisptap9", "-device",
                                               "virtio-net-device,netdev=n,id=n,mac=52:54"], ["52:54"]),
    ]
    for name, words, mentions in cases:
        refused(checks, context, name, words, mentions)
    checks.check("the socket in use still belongs to its owner", os.path.exists(busy))

    # Somebody else writes to the disk: a second machine must not.
    import fcntl
    with open(disk, "r+b") as holder:
        fcntl.fcntl(holder, fcntl.F_OFD_SETLK, ofd_write_lock())
        refused(checks, context, "a disk that another program has locked", drive(f"file={disk},id=d0"), [disk])
    listening.close()


def ofd_write_lock():
    import fcntl
    import struct

    return struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
