"""The other ways into a guest: bzImage with four CPUs and a reboot, the 64-bit entry, the flat image with the command
line that every StratoVirt user types, and Kata's."""
import os
import re
import socket

from harness import Machine, QUICK, SHELL

MIB = 1 << 20


def smp_and_reboot(checks, context, root_disk):
    """bzImage, four CPUs; the file written by the machine before is intact; a reboot ends in a second boot."""
    # reboot=k: by the keyboard controller, which QEMU's microvm does not have. The ACPI reset register is for `linux64`.
    way = "" if context.is_qemu else " reboot=k"
    machine = Machine(context, kernel="bzImage", memory=512, cpus=4, append=f"root=/dev/vda rw {SHELL}{way}")
    machine.disk("rootfs", root_disk, options="direct=off")
    with machine:
        machine.start()
        machine.console.wait_shell(90)
        checks.check("bzImage boots Debian to a shell", True)
        checks.equal("four CPUs are up", machine.console.output_of("grep -c ^processor /proc/cpuinfo"), "4")
        text = machine.console.output_of(
            "for c in 0 1 2 3; do taskset -c $c sh -c 'read a < /proc/self/stat; set -- $a; shift 38; echo $1'; done", 60)
        checks.equal("each of them runs a program", text.split(), ["0", "1", "2", "3"])
        if context.kept:
            status, text = machine.console.run("sha256sum -c /root/kept.sum", 60)
            checks.check("the file written before the power cycle is whole", status == 0, text)
        qmp = machine.qmp()
        checks.equal("query-cpus-fast", [cpu["cpu-index"] for cpu in qmp("query-cpus-fast")], [0, 1, 2, 3])
        machine.console.output_of("echo written before the reboot >/root/mark && sync")
        machine.console.send("reboot -f\n")
        event = qmp.event("RESET", 20)
        checks.equal("RESET is by the guest", event["data"]["guest"], True)
        machine.console.expect("WISP-INIT", 90)
        machine.console.wait_shell(90)
        checks.equal("four CPUs after the reboot",
                     machine.console.output_of("grep -c ^processor /proc/cpuinfo"), "4")
        checks.equal("the file written before the reboot is there",
                     machine.console.output_of("cat /root/mark"), "written before the reboot")
        qmp("quit")
        event = qmp.event("SHUTDOWN")
        checks.equal("SHUTDOWN by quit", (event["data"]["guest"], event["data"]["reason"]), (False, "host-qmp-quit"))
        checks.equal("exit status after quit", machine.wait(), 0)


def linux64(checks, context):
    """vmlinux without the PVH note: the 64-bit boot protocol; a reset under -no-reboot ends the machine."""
    machine = Machine(context, kernel="vmlinux-nopvh", memory=160, append="wisp.do=reboot").add("-no-reboot")
    with machine:
        machine.start()
        machine.console.expect("WISP-INIT", 60)
        checks.check("vmlinux by the 64-bit protocol reaches init", True)
        checks.equal("-no-reboot: a reset ends the machine", machine.wait(), 0)


def stratovirt_line(checks, context, root_disk):
    """The flat vmlinux.bin, with StratoVirt's own words."""
    machine = Machine(context)
    machine.words = [
        "-machine", "microvm", "-smp", "1", "-m", "1024m", "-kernel", context.image("vmlinux.bin"),
        # Debian's kernel has its virtio drivers as modules: hence the initrd, which StratoVirt's example does without.
        "-initrd", context.image("initrd.img"),
        "-append", f"{QUICK} reboot=k pci=off root=/dev/vda {SHELL}",
        "-drive", f"file={root_disk},id=rootfs,readonly=off,direct=off",
        "-device", "virtio-blk-device,drive=rootfs,id=rootfs",
        "-qmp", f"unix:{machine.qmp_path},server,nowait", "-serial", "stdio"]
    with machine:
        machine.start()
        machine.console.wait_shell()
        checks.check("vmlinux.bin with StratoVirt's command line boots to a shell", True)
        total = int(machine.console.output_of("awk '/^MemTotal/ {print $2}' /proc/meminfo"))
        checks.check("-m 1024m is MiB", 900 * 1024 < total < 1024 * 1024, f"{total} kB")
        machine.console.send("poweroff -f\n")
        checks.equal("exit status after power-off", machine.wait(), 0)


def kata_line(checks, context, root_disk):
    """Kata Containers' command line: no ACPI, a vhost-vsock descriptor, a tap descriptor, a console on a socket."""
    machine = Machine(context)
    console_path = context.path("kata-console")
    tap = open_tap("wisptap1")
    vhost = os.open("/dev/vhost-vsock", os.O_RDWR)
    machine.words = [
        "-name", "sandbox-e2e", "-uuid", "a1b2c3d4-0000-4000-8000-000000000001", "-smp", "1", "-m", "256",
        "-kernel", context.image("vmlinux"), "-initrd", context.image("initrd.img"),
        "-append", f"{QUICK} reboot=k root=/dev/vda ro {SHELL} net.ifnames=0 pci=off iommu=off acpi=off"
                   " wisp.modules=net,vsock,rng,console",
        "-qmp", f"unix:{machine.qmp_path},server,nowait", "-D", "-disable-seccomp",
        "-machine", "type=microvm,dump-guest-core=off",
        "-object", "rng-random,id=objrng0,filename=/dev/urandom", "-device", "virtio-rng-device,rng=objrng0,id=virtio-rng0",
        "-drive", f"id=rootfs,file={root_disk},readonly=on,direct=off",
        "-device", "virtio-blk-device,drive=rootfs,id=virtio-blk0",
        "-device", f"vhost-vsock-device,id=vsock-id,guest-cid=77,vhostfd={vhost}",
        "-netdev", f"tap,id=eth0,fds={tap}", "-device", "virtio-net-device,netdev=eth0,id=eth0,mac=52:54:00:aa:bb:cc",
        "-device", "virtio-serial-device,id=virtio-serial0",
        "-chardev", f"socket,id=charconsole0,path={console_path},server,nowait",
        "-device", "virtconsole,chardev=charconsole0,id=virtio-console0,nr=0",
        "-serial", "stdio"]
    with machine:
        machine.start(pass_fds=(tap, vhost))
        os.close(tap)
        os.close(vhost)
        machine.console.wait_shell()
        checks.check("Kata's command line boots to a shell without ACPI", True)
        shell = machine.console
        checks.equal("the root is read-only", shell.output_of("cat /sys/block/vda/ro"), "1")
        checks.equal("eth0 has Kata's address", shell.output_of("cat /sys/class/net/eth0/address"), "52:54:00:aa:bb:cc")
        with socket.socket(socket.AF_UNIX) as console:
            console.connect(console_path)
            console.settimeout(20)
            shell.output_of("echo through the console >/dev/hvc0")
            received = b""
            while b"\n" not in received:
                received += console.recv(4096)
            checks.equal("virtconsole on a socket", received.strip(), b"through the console")
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listening:
            listening.bind((socket.VMADDR_CID_ANY, 6000))
            listening.listen()
            listening.settimeout(20)
            mark = shell.start("echo over vhost | socat -t 5 -u - VSOCK-CONNECT:2:6000")
            connection, (cid, _) = listening.accept()
            with connection:
                connection.settimeout(20)
                checks.equal("vhost-vsock by descriptor", (cid, connection.recv(100).strip()), (77, b"over vhost"))
            shell.finish(mark)
        # Kata ends a sandbox with `quit`.
        qmp = machine.qmp()
        qmp("quit")
        checks.equal("exit status after quit", machine.wait(), 0)
    checks.check("nothing is left behind", not os.path.exists(machine.qmp_path) and not os.path.exists(console_path))


def open_tap(name):
    """A descriptor of a new tap device, as Kata's shim passes one (TUNSETIFF with IFF_TAP, IFF_NO_PI, IFF_VNET_HDR)."""
    import fcntl
    import struct

    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x0002 | 0x1000 | 0x4000))
    return descriptor


def virtual_time(checks, context):
    """A boot with a virtual clock: twice the same, to the byte and the instruction; the seed makes the difference."""
    def boot(seed):
        machine = Machine(context, append="wisp.do=poweroff")
        machine.words[machine.words.index("-accel") + 1] = f"soft,clock=virtual,seed={seed}"
        machine.add("-no-reboot")
        with machine:
            machine.start()
            status = machine.wait(60)
            counted = re.search(r"virtual clock: (\d+) instructions, [\d.]+ s", machine.error_text())
            return status, machine.console.text, int(counted.group(1)) if counted else 0

    first, second, other = boot(1), boot(1), boot(2)
    checks.equal("it ends well", first[0], 0)
    checks.check("it reaches init", "WISP-INIT" in first[1], first[1][-600:])
    checks.check("its instructions are counted", first[2] > 100_000_000, f"{first[2]}")
    checks.equal("the same bytes on the console", second[1], first[1])
    checks.equal("the same number of instructions", second[2], first[2])
    checks.check("another seed is another run", other[2] != first[2], f"{other[2]}")
