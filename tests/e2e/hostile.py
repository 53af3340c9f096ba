"""Guests that mean no good (guest/hostile.S): the process stays bounded in memory, answers QMP, and ends at once."""
import os
import time

from harness import Machine, run_checked

HOSTILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "guest", "hostile.S")
KINDS = {
    1: "jumps to nowhere",
    2: "triple faults, again after each reset",
    3: "loops without interrupts",
    4: "rewrites its own code",
    5: "runs through one page that is everywhere",
    6: "holds interrupts back for ever",
    7: "fills the translation cache",
    8: "faults for ever",
}
MEMORY = 128  # MiB
# Beside the guest's memory: 64 MiB of generated code with what is known of its blocks, and the program.
MOST = 192  # MiB


def resident(process):
    """MiB of the process."""
    with open(f"/proc/{process.pid}/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    return 0


def assemble(context, kind):
    name = context.unique("hostile")
    run_checked("as", "--64", "--defsym", f"KIND={kind}", HOSTILE, "-o", f"{name}.o")
    run_checked("ld", "-N", "--no-warn-rwx-segments", "-Ttext=0x100000", "-e", "start32", "-o", name, f"{name}.o")
    return name


def run(checks, context, _root):
    for kind, name in KINDS.items():
        machine = Machine(context, kernel=assemble(context, kind), initrd=None, memory=MEMORY)
        with machine:
            machine.start()
            machine.console.expect("hostile", 10)
            qmp = machine.qmp()
            sizes = []
            slowest = 0.0
            for _ in range(6):
                # The one that resets writes each time.
                machine.console.pump(0.5 * context.patience)
                time.sleep(0.1)
                started = time.monotonic()
                status = qmp("query-status")
                slowest = max(slowest, time.monotonic() - started)
                sizes.append(resident(machine.process))
            checks.check(f"{name}: QMP answers", status["running"] and slowest < context.patience,
                         f"{status}, after {slowest:.2f} s")
            checks.check(f"{name}: memory stays bounded", max(sizes) < MEMORY + MOST,
                         " ".join(f"{size:.0f}" for size in sizes) + " MiB")
            started = time.monotonic()
            qmp("quit")
            status = machine.wait(10)
            took = time.monotonic() - started
            if kind == 2:
                checks.check(f"{name}: told once", machine.error_text().count("triple fault") == 1, machine.error_text())
            checks.check(f"{name}: quit ends it at once", status == 0 and took < context.patience,
                         f"status {status} after {took:.2f} s")
