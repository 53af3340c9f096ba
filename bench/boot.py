#!/usr/bin/python3
"""bench/boot.py [--runs N] [--cpus N] [--kernel NAME] [--here]

Wall time from the start of the process to the guest's init, Wisp beside QEMU's microvm (-accel kvm, qboot), the two
taking turns. In the nested bed unless --here.
"""
import os
import select
import subprocess
import sys
import time

from common import in_bed, name_of, parser, shown, summary, table, vmm_command


def boot(command, limit=120):
    """Seconds until the guest's init has printed its line, and the uptime that the guest saw then."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    text, reached = b"", None
    try:
        while reached is None:
            ready, _, _ = select.select([process.stdout], [], [], max(0, started + limit - time.monotonic()))
            data = os.read(process.stdout.fileno(), 65536) if ready else b""
            if not data:
                process.kill()
                errors = process.communicate()[1].decode(errors="replace")
                sys.exit(f"boot.py: no init from: {shown(command)}\n{text.decode(errors='replace')[-800:]}\n{errors[-800:]}")
            text += data
            if b"WISP-INIT" in text and text.split(b"WISP-INIT", 1)[1].find(b"\n") >= 0:
                reached = time.monotonic() - started
        process.communicate(timeout=limit)
    finally:
        process.kill()
        process.wait()
    uptime = text.split(b"uptime=")[1].split()[0].decode()
    return reached, float(uptime)


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--cpus", type=int, default=1)
    arguments.add_argument("--kernel", default="vmlinux", choices=("vmlinux", "bzImage"))
    options = arguments.parse_args()
    in_bed(options, timeout=120 + options.runs * 240)
    vmms = [options.vmm, options.qemu]
    commands = [vmm_command(vmm, options.images, cpus=options.cpus, kernel=options.kernel, append="wisp.do=poweroff")
                for vmm in vmms]
    times, uptimes = [[], []], [[], []]
    for _ in range(options.runs):
        for index, command in enumerate(commands):
            wall, uptime = boot(command)
            times[index].append(wall)
            uptimes[index].append(uptime)
    medians = [summary(values) for values in times]
    rows = []
    for index, vmm in enumerate(vmms):
        median, least, most = medians[index]
        rows.append((name_of(vmm), f"{median:.2f}", f"{least:.2f}-{most:.2f}", f"{summary(uptimes[index])[0]:.2f}",
                     f"{median / medians[1][0]:.2f}"))
    table(f"Boot to init, seconds, {options.runs} runs each, {options.cpus} vCPU, {options.kernel}",
          ("VMM", "median", "range", "guest's own uptime at init", "of QEMU"), rows, [shown(c) for c in commands])


main()
