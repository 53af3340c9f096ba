#!/usr/bin/python3
"""bench/startup.py [--runs N] [--memory MIB] [--realtime] [--bed]

Time from exec of the VMM to the guest's first KVM_RUN, Wisp beside QEMU's microvm and beside a static program that does
nothing else (what exec and the C library cost on this host), taking turns; on this host unless --bed. bench/first_kvm_run.cpp catches that call with a seccomp filter, which costs other calls next to nothing.
Wisp runs with probe=off, since its measurement of the processor is a KVM_RUN before the guest's. The kernel is Debian's
vmlinux (50 MB), in the page cache. --realtime runs both at real-time priority (needs root), for a busy host.
"""
import os
import subprocess
import sys

from common import ROOT, in_bed, name_of, parser, shown, summary, table, vmm_command

CATCHER = os.path.join(ROOT, "build/bench/first_kvm_run")


def build_catcher():
    source = os.path.join(ROOT, "bench/first_kvm_run.cpp")
    if not os.path.exists(CATCHER) or os.path.getmtime(CATCHER) < os.path.getmtime(source):
        os.makedirs(os.path.dirname(CATCHER), exist_ok=True)
        subprocess.run(["g++", "-std=c++20", "-O2", "-static", "-Wall", "-Wextra", "-o", CATCHER, source], check=True)


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--runs", type=int, default=50)
    arguments.add_argument("--memory", type=int, default=1024)
    arguments.add_argument("--realtime", action="store_true")
    arguments.add_argument("--bed", action="store_true")
    options = arguments.parse_args()
    catcher = CATCHER
    if os.environ.get("WISP_BED"):
        catcher = "/bench/first_kvm_run"
    else:
        build_catcher()
        options.here = not options.bed
        if options.bed:
            # The bed is shown bench/: the program goes along with it.
            subprocess.run(["cp", CATCHER, os.path.join(ROOT, "bench/first_kvm_run")], check=True)
        in_bed(options)
    vmms = [options.vmm, options.qemu]
    commands = [vmm_command(vmm, options.images, memory=options.memory, accel="kvm,probe=off") for vmm in vmms]
    commands.append([catcher, "--floor"])
    prefix = ["chrt", "-f", "10"] if options.realtime else []
    times, cpu_times = [[] for _ in commands], [[] for _ in commands]
    for _ in range(options.runs):
        for index, command in enumerate(commands):
            result = subprocess.run([*prefix, catcher, *command], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                                    timeout=60, check=False)
            if result.returncode != 0:
                sys.exit(f"startup.py: no KVM_RUN from: {shown(command)}\n{result.stdout}{result.stderr}")
            wall, cpu = (int(word) / 1e6 for word in result.stdout.split()[-2:])
            times[index].append(wall)
            cpu_times[index].append(cpu)
    medians = [summary(values) for values in times]
    names = [name_of(vmm) for vmm in vmms] + ["a static program that does nothing"]
    rows = [(name, f"{medians[i][0]:.2f}", f"{medians[i][1]:.2f}-{medians[i][2]:.2f}",
             f"{medians[i][0] / medians[1][0]:.2f}", f"{summary(cpu_times[i])[0]:.2f}") for i, name in enumerate(names)]
    table(f"exec to first KVM_RUN, milliseconds, {options.runs} runs each",
          ("VMM", "median", "range", "of QEMU", "CPU time"), rows, [shown(c) for c in commands])


main()
