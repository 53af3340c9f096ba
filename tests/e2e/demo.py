#!/usr/bin/python3
"""demo.py --vmm PROGRAM --images DIR --root DISK [--interactive] [--bed]

Boots Debian on the virtio disk DISK with its console here. Not interactive, it waits for the login, runs a few commands
as root and powers off; exit status 0 where all of it went well. (scripts/demo calls this, on the host or in the bed.)
"""
import argparse
import os
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True

from harness import Context, Failure, Machine  # noqa: E402

PROMPT = r"root@wisp:[^\n]*# "
COMMANDS = (
    "uname -srm",
    "grep PRETTY_NAME /etc/os-release",
    "findmnt -no SOURCE,FSTYPE,SIZE /",
    "grep MemTotal /proc/meminfo",
    "systemd-detect-virt",
    "systemctl is-system-running --wait",
    "systemd-analyze time | head -1",
)


class Echo:
    """Prints what comes from the console as it comes."""

    def __init__(self, console):
        self.console = console
        self.shown = 0
        self.pump = console.pump
        console.pump = self

    def __call__(self, seconds):
        result = self.pump(seconds)
        sys.stdout.write(self.console.text[self.shown:])
        sys.stdout.flush()
        self.shown = len(self.console.text)
        return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vmm", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--root", required=True)
    parser.add_argument("--interactive", action="store_true")
    parser.add_argument("--bed", action="store_true", help="the CPU is emulated: everything takes longer")
    options = parser.parse_args()

    context = Context(options.vmm, options.images, accel="auto", work=tempfile.mkdtemp(prefix="wisp-demo-"))
    machine = Machine(context, kernel="vmlinux", memory=512, append="root=/dev/vda rw reboot=k systemd.show_status=1")
    machine.disk("rootfs", options.root, options="direct=off")
    command = machine.command()
    print("$ " + " ".join(f'"{word}"' if " " in word else word for word in command), flush=True)
    if options.interactive:
        os.execv(command[0], command)

    try:
        with machine:
            started = time.monotonic()
            machine.start()
            Echo(machine.console)
            limit = 200 if options.bed else 40
            machine.console.expect(PROMPT, limit)
            took = time.monotonic() - started
            for line in COMMANDS:
                machine.console.send(line + "\n")
                machine.console.expect(PROMPT, limit)
            machine.console.send("poweroff\n")
            status = machine.wait(limit)
    except Failure as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    where = " (under an emulated CPU, in the nested bed)" if options.bed else ""
    print(f"\nDebian was at its shell {took:.1f} s after the start of {os.path.basename(options.vmm)}{where};"
          f" exit status after power-off: {status}.")
    return status


sys.exit(main())
