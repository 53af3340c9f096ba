#!/usr/bin/python3
"""bench/syscalls.py [--here]

System calls of each thread of the VMM from its start to the guest's init, counted by strace. KVM_RUN is counted apart:
it is the guest's doing.
"""
import collections
import os
import re
import subprocess
import tempfile

from common import in_bed, name_of, parser, shown, table, vmm_command
from harness import Console, die_with_parent

CALL = re.compile(r"^([a-z0-9_]+)\((.*)")


def count(command):
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(["strace", "-ff", "-s", "64", "-o", os.path.join(folder, "t")] + command,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=die_with_parent)
        try:
            Console(process.stdin.fileno(), process.stdout.fileno()).expect("WISP-INIT", 300)
        finally:
            process.terminate()
            process.wait()
        threads = []
        for entry in sorted(os.listdir(folder), key=lambda name: int(name.split(".")[1])):
            calls, name, runs = collections.Counter(), "", 0
            with open(os.path.join(folder, entry), encoding="utf-8", errors="replace") as file:
                for line in file:
                    match = CALL.match(line)
                    if not match:
                        continue
                    if match[1] == "ioctl" and "KVM_RUN" in match[2]:
                        runs += 1
                        continue
                    calls[match[1]] += 1
                    if match[1] == "prctl" and "PR_SET_NAME" in match[2]:
                        name = match[2].split('"')[1]
            threads.append((name or ("main" if not threads else "(unnamed)"), calls, runs))
        return threads


def main():
    options = parser(__doc__).parse_args()
    in_bed(options)
    rows, commands = [], []
    for vmm in (options.vmm, options.qemu):
        command = vmm_command(vmm, options.images, append="wisp.do=hold cryptomgr.notests")
        if name_of(vmm) != "Wisp":
            command += ["-name", "guest,debug-threads=on"]
        commands.append(shown(command))
        for name, calls, runs in count(command):
            most = ", ".join(f"{call} {number}" for call, number in calls.most_common(6))
            rows.append((name_of(vmm), name, sum(calls.values()), len(calls), runs, most))
    table("System calls from start to the guest's init, by thread",
          ("VMM", "thread", "calls", "different ones", "KVM_RUN", "most frequent"), rows, commands)


main()
