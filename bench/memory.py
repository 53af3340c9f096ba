#!/usr/bin/python3
"""bench/memory.py [--memory MIB] [--mappings] [--here]

Memory of the VMM's process beyond the guest's RAM, once the guest has reached its init: the sum of PSS over all
mappings of /proc/PID/smaps except the guest's RAM. --mappings shows where it lies.
"""
import re
import sys

from common import in_bed, name_of, parser, shown, table, vmm_command
from harness import Console, die_with_parent

import subprocess

HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \d+\s*(.*)$")


def mappings(pid):
    result = []
    with open(f"/proc/{pid}/smaps", encoding="utf-8") as file:
        for line in file:
            match = HEADER.match(line)
            if match:
                result.append({"start": int(match[1], 16), "end": int(match[2], 16), "name": match[4]})
            else:
                key, _, value = line.partition(":")
                if value.strip().endswith("kB"):
                    result[-1][key] = int(value.split()[0])
    return result


def guest_ram(areas, size):
    """The mappings that tile exactly `size` bytes, or the one that is a little larger (merged with a neighbour)."""
    for first in range(len(areas)):
        last, at = first, areas[first]["start"]
        while last < len(areas) and areas[last]["start"] == at and at - areas[first]["start"] < size:
            at = areas[last]["end"]
            last += 1
        if at - areas[first]["start"] == size:
            return areas[first:last]
    near = [area for area in areas if size <= area["end"] - area["start"] < size + (8 << 20)]
    if len(near) != 1:
        sys.exit(f"memory.py: cannot tell the guest's RAM from other mappings ({len(near)} candidates)")
    return near


def measure(command, size, show):
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=die_with_parent)
    try:
        console = Console(process.stdin.fileno(), process.stdout.fileno())
        console.expect("WISP-INIT", 300)
        console.pump(1.0)
        areas = mappings(process.pid)
        ram = guest_ram(areas, size)
        rest = [area for area in areas if area not in ram]
        with open(f"/proc/{process.pid}/status", encoding="ascii") as file:
            threads = next(line.split()[1] for line in file if line.startswith("Threads"))
        if show:
            for area in sorted(rest, key=lambda area: -area["Pss"])[:16]:
                print(f"    {area['Pss']:6} KiB, dirty {area['Private_Dirty']:6}, of "
                      f"{(area['end'] - area['start']) >> 10:8} {area['name'] or 'anonymous'}")
        return (sum(area["Pss"] for area in rest), sum(area["Private_Dirty"] for area in rest),
                sum(area["Pss"] for area in ram), threads)
    finally:
        process.kill()
        process.wait()


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--memory", type=int, default=256)
    arguments.add_argument("--mappings", action="store_true")
    options = arguments.parse_args()
    in_bed(options)
    rows, commands = [], []
    for vmm in (options.vmm, options.qemu):
        command = vmm_command(vmm, options.images, memory=options.memory, append="wisp.do=hold")
        beyond, dirty, ram, threads = measure(command, options.memory << 20, options.mappings)
        rows.append((name_of(vmm), f"{beyond / 1024:.2f}", f"{dirty / 1024:.2f}", f"{ram / 1024:.1f}", threads))
        commands.append(shown(command))
    table(f"Memory of the process beyond {options.memory} MiB of guest RAM, MiB, guest at its init",
          ("VMM", "PSS beyond guest RAM", "of it private and dirty", "PSS of guest RAM", "threads"), rows, commands)


main()
