"""A directory of the host in the guest: vhost-user-fs, served by QEMU's own virtiofsd (Debian's qemu-system-common)."""
import os
import subprocess
import time

from harness import Failure, Machine, SHELL, die_with_parent, pattern_file, sha256_of

MIB = 1 << 20
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"


def start_virtiofsd(context, folder, path):
    log = context.path("virtiofsd.log")
    with open(log, "wb") as output:
        server = subprocess.Popen([VIRTIOFSD, f"--socket-path={path}", "-o", f"source={folder}", "-o", "cache=auto"],
                                  stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=die_with_parent)
    deadline = time.monotonic() + 10 * context.patience
    while not os.path.exists(path):
        if server.poll() is not None or time.monotonic() > deadline:
            server.kill()
            with open(log, encoding="utf-8", errors="replace") as text:
                raise Failure(f"virtiofsd does not come up: {text.read()}")
        time.sleep(0.02)
    return server


def run(checks, context, root_disk):
    folder, path = context.path("shared"), context.path("virtiofsd.sock")
    os.makedirs(os.path.join(folder, "below"))
    digest = pattern_file(os.path.join(folder, "from-host"), 4 * MIB, seed=7)
    program = os.path.join(folder, "below", "program")
    with open(program, "w", encoding="ascii") as file:
        file.write("#!/bin/sh\necho run from the host\n")
    os.chmod(program, 0o755)

    machine = Machine(context, memory=256, append=f"root=/dev/vda ro {SHELL} wisp.modules=fs")
    machine.words[machine.words.index("microvm")] = "microvm,mem-share=on"
    machine.disk("rootfs", root_disk, readonly=True, options="direct=off")
    machine.add("-chardev", f"socket,id=fs0,path={path}",
                "-device", "vhost-user-fs-device,chardev=fs0,tag=shared,id=fs0")
    server = start_virtiofsd(context, folder, path)
    try:
        with machine:
            machine.start()
            machine.console.wait_shell()
            use(checks, machine.console, folder, digest)
            survive(checks, machine, server)
    finally:
        server.kill()
        server.wait()


def use(checks, console, folder, digest):
    console.output_of("mount -t virtiofs shared /mnt")
    checks.equal("the guest sees the host's folder", console.output_of("ls /mnt").split(), ["below", "from-host"])
    checks.equal("what the guest reads is what the host wrote",
                 console.output_of("sha256sum /mnt/from-host | cut -c1-64", 60), digest)
    # A copy of another size, so that neither the whole nor its beginning can be the host's own file.
    console.output_of("(cat /mnt/from-host; dd if=/mnt/from-host bs=1000 count=1001 2>/dev/null) >/mnt/from-guest && sync", 60)
    expected = console.output_of("sha256sum /mnt/from-guest | cut -c1-64", 60)
    written = os.path.join(folder, "from-guest")
    checks.equal("size of what the guest wrote", os.path.getsize(written), 4 * MIB + 1001 * 1000)
    checks.equal("what the guest wrote is what the host reads", sha256_of(written), expected)
    checks.equal("a program of the folder runs", console.output_of("/mnt/below/program"), "run from the host")
    console.output_of("mkdir /mnt/new && mv /mnt/from-guest /mnt/new/moved && rm /mnt/from-host")
    checks.equal("folders, moving and removing",
                 (sorted(os.listdir(folder)), os.listdir(os.path.join(folder, "new"))), (["below", "new"], ["moved"]))
    with open(os.path.join(folder, "later"), "w", encoding="ascii") as file:
        file.write("written while mounted\n")
    checks.equal("a file made later appears", console.output_of("cat /mnt/later"), "written while mounted")
    checks.check("a file that is not there is not", console.run("cat /mnt/nothing 2>&1")[0] != 0)


def survive(checks, machine, server):
    """The server dies: requests hang, as they do on a network file system, and the machine goes on."""
    server.kill()
    server.wait()
    machine.console.output_of("(ls /mnt/below >/dev/null 2>&1 &)")
    checks.equal("the guest goes on without the server", machine.console.output_of("echo here"), "here")
    qmp = machine.qmp()
    checks.equal("and the machine too", qmp("query-status")["status"], "running")
    qmp("quit")
    checks.equal("exit status after quit", machine.wait(), 0)
