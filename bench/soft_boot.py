#!/usr/bin/python3
"""bench/soft_boot.py [--runs N] [--cpus N]

The software CPU beside QEMU's TCG on this host: wall time from the start of the process to the guest's init, the two
taking turns, with and without the kernel's self-tests of its ciphers (two thirds of the instructions of a boot). With
one vCPU also Wisp's own boot with a virtual clock.
"""
import os
import select
import subprocess
import sys
import time

from common import images, parser, shown, soft_command, summary, table

APPEND = "console=ttyS0 quiet"


def boot(command, limit=120):
    """Seconds until the guest's init has printed its line."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    text = b""
    try:
        while b"WISP-INIT" not in text:
            ready, _, _ = select.select([process.stdout], [], [], max(0, started + limit - time.monotonic()))
            data = os.read(process.stdout.fileno(), 65536) if ready else b""
            if not data:
                sys.exit(f"soft_boot.py: no init from: {shown(command)}\n{text.decode(errors='replace')[-800:]}")
            text += data
        return time.monotonic() - started
    finally:
        process.kill()
        process.wait()


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--cpus", type=int, default=1)
    options = arguments.parse_args()
    folder = images()
    rows, commands = [], []
    for title, append in (("quiet", ""), ("quiet, cryptomgr.notests", "cryptomgr.notests")):
        words = " ".join([APPEND, *append.split(), "wisp.do=poweroff"])
        pair = [soft_command(program, folder, words, cpus=options.cpus) for program in (options.vmm, options.qemu)]
        names = ["Wisp", "QEMU TCG"]
        if options.cpus == 1:
            pair.append(soft_command(options.vmm, folder, words, accel="soft,clock=virtual"))
            names.append("Wisp, virtual clock")
        commands += pair if not commands else []
        times = [[] for _ in pair]
        for _ in range(options.runs):
            for index, command in enumerate(pair):
                times[index].append(boot(command))
        base = summary(times[1])[0]
        for index, name in enumerate(names):
            median, least, most = summary(times[index])
            rows.append((title, name, f"{median:.2f}", f"{least:.2f}-{most:.2f}", f"{median / base:.2f}"))
    table(f"Boot to init on the software CPU, seconds, {options.runs} runs each, {options.cpus} vCPU",
          ("kernel command line", "VMM", "median", "range", "of QEMU"), rows, [shown(c) for c in commands])


main()
