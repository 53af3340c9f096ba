#!/usr/bin/python3
"""bench/syscalls.py [--here]

System calls of each thread of the VMM from its exec to the guest's init, counted by the kernel's own trace histograms
(no debugger slows the VMM down). ioctl(KVM_RUN) is counted apart: it is the guest's doing. Needs root for tracefs.
"""
import collections
import os
import re
import subprocess

from common import in_bed, name_of, parser, shown, table, vmm_command
from harness import Console, die_with_parent

TRACE = "/sys/kernel/tracing"
CALLS = f"{TRACE}/events/raw_syscalls/sys_enter"
IOCTLS = f"{TRACE}/events/syscalls/sys_enter_ioctl"
TRIGGERS = {CALLS: "hist:keys=common_pid,id.syscall:size=8192", IOCTLS: "hist:keys=common_pid if cmd == 0xae80"}
LINE = re.compile(r"common_pid: +(\d+)(?:, id: sys_(\w+) +\[ *\d+\])? +\} hitcount: +(\d+)")


def set_triggers(remove=False):
    for event, trigger in TRIGGERS.items():
        with open(f"{event}/trigger", "w", encoding="ascii") as file:
            file.write(("!" if remove else "") + trigger)


def histogram(event):
    with open(f"{event}/hist", encoding="ascii") as file:
        return [(int(pid), call, int(hits)) for pid, call, hits in LINE.findall(file.read())]


def count(command):
    """(name, calls by name, KVM_RUNs) of each thread, in order of their birth."""
    if not os.path.exists(CALLS):
        subprocess.run(["mount", "-t", "tracefs", "tracefs", TRACE], check=True)
    set_triggers()
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=die_with_parent)
        try:
            Console(process.stdin.fileno(), process.stdout.fileno()).expect("WISP-INIT", 300)
            calls, runs = histogram(CALLS), histogram(IOCTLS)
            names = {}
            for thread in os.listdir(f"/proc/{process.pid}/task"):
                with open(f"/proc/{process.pid}/task/{thread}/comm", encoding="utf-8") as file:
                    names[int(thread)] = file.read().strip()
        finally:
            process.kill()
            process.wait()
    finally:
        set_triggers(remove=True)
    by_thread = collections.defaultdict(collections.Counter)
    for pid, call, hits in calls:
        # Threads that have ended have no name any more; nothing else is started meanwhile.
        if pid in names or process.pid < pid < max(names) + 32:
            by_thread[pid][call] += hits
    kvm_runs = {pid: hits for pid, _, hits in runs}
    for pid, counter in by_thread.items():
        counter["ioctl"] -= kvm_runs.get(pid, 0)
    return [(names.get(pid, "(ended)"), +by_thread[pid], kvm_runs.get(pid, 0)) for pid in sorted(by_thread)]


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
    table("System calls from exec to the guest's init, by thread",
          ("VMM", "thread", "calls", "different ones", "KVM_RUN", "most frequent"), rows, commands)


main()
