#!/usr/bin/python3
"""bench/user_mode.py [--runs N] [--kinds A,B] [--interpreter] [--nice N]

Programs in guest user mode on the software CPU beside QEMU's TCG, and on the host itself: bench/guest/compute.c, the
same static program everywhere, its guests started from an initramfs with mitigations=off. The ones compared take turns;
each figure is the median of the runs. Of TCG's processors (Nehalem, max) the better one counts, kind by kind. Every
kind must compute the same everywhere, and a guest's clock must run as the host's does: else the exit status is 1.
"""
import math
import os
import select
import subprocess
import sys
import time

from common import APPEND, ROOT, images, parser, shown, soft_command, summary, table
from harness import die_with_parent

COMPUTE = ("xorshift", "crc-1k", "sha-block", "memcpy-64k", "rep-movsb-64k", "matmul-64", "chase-2m", "qsort-4096",
           "fib-20", "dispatch")
SYSTEM = ("getppid", "read-4k", "page-fault", "pipe", "fork", "exec")
INITRD = "compute.img"


def newer(made, *sources):
    return os.path.exists(made) and all(os.path.getmtime(made) >= os.path.getmtime(source) for source in sources)


def build(folder):
    """The program and the initramfs with it, made anew where their sources changed; the program's path."""
    source, init = (os.path.join(ROOT, "bench/guest", name) for name in ("compute.c", "compute-init"))
    program, initrd = os.path.join(folder, "compute"), os.path.join(folder, INITRD)
    maker = os.path.join(ROOT, "scripts/make-initrd")
    if not newer(program, source):
        subprocess.run(["gcc", "-std=gnu11", "-O2", "-static", "-Wall", "-Wextra", "-o", program, source], check=True)
    if not newer(initrd, program, init, maker):
        subprocess.run([sys.executable, maker, initrd, "--init", init, "--modules", os.path.join(folder, "modules"),
                        "--file", f"{program}:bin/compute"], check=True)
    return program


class Run:
    """What one run of the program printed, with the time at which its clock's two lines came."""

    def __init__(self, name, command, options):
        self.name, self.command = name, command
        self.results, self.wrong = {}, []
        self.clocks = []  # (host's seconds, program's nanoseconds)
        self.text = ""
        self.status = None

        def in_child():
            die_with_parent()
            os.nice(options.nice)

        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   preexec_fn=in_child)
        deadline = time.monotonic() + options.limit
        rest = ""
        try:
            while self.status is None:
                ready, _, _ = select.select([process.stdout], [], [], max(0, deadline - time.monotonic()))
                data = os.read(process.stdout.fileno(), 65536) if ready else b""
                now = time.monotonic()
                if not data:
                    break
                *lines, rest = (rest + data.decode(errors="replace").replace("\r", "")).split("\n")
                for line in lines:
                    self.take(line, now)
            if not ready:
                self.text += f"\n(nothing more within {options.limit:.0f} s)"
        finally:
            if self.status is None:
                process.kill()
            try:
                # A guest may take its time to power off; what it measured is known by then.
                code = process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
            process.stdout.close()
        if self.status is None and command[0].endswith("compute"):
            self.status = code

    def take(self, line, now):
        self.text += line + "\n"
        words = line.split()
        if len(words) == 2 and words[0] == "clock":
            self.clocks.append((now, int(words[1])))
        elif len(words) == 3 and words[0] in COMPUTE + SYSTEM:
            self.results[words[0]] = (float(words[1]), words[2])
        elif line.startswith("COMPUTE-END status="):
            self.status = int(words[1].split("=")[1])

    def failures(self, kinds):
        """What is wrong with this run, as text."""
        found = []
        if self.status != 0 or len(self.clocks) != 2:
            found.append(f"{self.name}: did not run to its end (status {self.status}): {shown(self.command)}\n"
                         + "    " + self.text.strip()[-1500:].replace("\n", "\n    "))
        else:
            here, there = (self.clocks[1][i] - self.clocks[0][i] for i in (0, 1))
            there /= 1e9
            if abs(there - here) > 0.03 * here + 0.1:
                found.append(f"{self.name}: its clock counted {there:.2f} s in {here:.2f} s: {shown(self.command)}")
        missing = [kind for kind in kinds if kind not in self.results]
        if missing:
            found.append(f"{self.name}: no result for {', '.join(missing)}")
        return found


def figure(value):
    return f"{value:,.0f}".replace(",", " ") if value >= 1000 else f"{value:.3g}"


def ratio(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def mean(values):
    """The geometric mean."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--runs", type=int, default=3)
    arguments.add_argument("--kinds", default="", help=f"of {', '.join(COMPUTE + SYSTEM)} (default: all)")
    arguments.add_argument("--interpreter", action="store_true", help="Wisp's interpreter alone, too")
    arguments.add_argument("--limit", type=float, default=120, help="seconds for one run (default: %(default)s)")
    arguments.add_argument("--nice", type=int, default=0, help="for all alike; below 0 for a busy host, as root")
    options = arguments.parse_args()
    kinds = [kind for kind in options.kinds.split(",") if kind] or list(COMPUTE + SYSTEM)
    unknown = [kind for kind in kinds if kind not in COMPUTE + SYSTEM]
    if unknown:
        sys.exit(f"user_mode.py: no kind '{unknown[0]}'; there are {', '.join(COMPUTE + SYSTEM)}")
    folder = options.images or images()
    program = build(folder)
    append = f"{APPEND} cryptomgr.notests" + (f" wisp.kinds={','.join(kinds)}" if options.kinds else "")
    commands = {"native": [program] + (kinds if options.kinds else []),
                "Wisp": soft_command(options.vmm, folder, append, initrd=INITRD)}
    if options.interpreter:
        commands["interpreter"] = soft_command(options.vmm, folder, append, initrd=INITRD,
                                               accel="soft,executor=interpret")
    for cpu in ("Nehalem", "max"):
        commands[f"TCG {cpu}"] = soft_command(options.qemu, folder, append, initrd=INITRD, cpu=cpu)
    times = {name: {kind: [] for kind in kinds} for name in commands}
    sums = {kind: {} for kind in kinds}
    failures = []
    for _ in range(options.runs):
        for name, command in commands.items():
            run = Run(name, command, options)
            failures += run.failures(kinds)
            for kind, (value, total) in run.results.items():
                times[run.name][kind].append(value)
                sums[kind].setdefault(total, set()).add(run.name)
    for kind in kinds:
        if len(sums[kind]) > 1:
            failures.append(f"{kind}: computed differently: "
                            + "; ".join(f"{total} by {', '.join(sorted(who))}" for total, who in sums[kind].items()))

    def median(name, kind):
        return summary(times[name][kind])[0] if times[name][kind] else math.nan

    rows, ratios = [], {kind: {} for kind in kinds}
    for kind in kinds:
        native, wisp = median("native", kind), median("Wisp", kind)
        tcg, which = min(((median(name, kind), name.split()[1]) for name in ("TCG Nehalem", "TCG max")
                          if times[name][kind]), default=(math.nan, "none"))
        ratios[kind] = {"wisp": wisp / native, "tcg": tcg / native, "of": wisp / tcg}
        row = [kind, figure(native), figure(wisp), ratio(wisp / native), f"{figure(tcg)} ({which})",
               ratio(tcg / native), ratio(wisp / tcg)]
        if options.interpreter:
            slow = median("interpreter", kind)
            ratios[kind]["slow"] = slow / native
            row += [figure(slow), ratio(slow / native)]
        rows.append(row)
    for title, group in (("compute", COMPUTE), ("system", SYSTEM)):
        chosen = [kind for kind in kinds if kind in group]
        if len(chosen) > 1:
            means = {key: ratio(mean([ratios[kind][key] for kind in chosen])) for key in ratios[chosen[0]]}
            row = [f"geometric mean, {len(chosen)} {title} kinds", "", "", means["wisp"], "", means["tcg"], means["of"]]
            rows.append(row + (["", means["slow"]] if options.interpreter else []))
    header = ["kind", "native ns", "Wisp ns", "x native", "TCG ns", "x native", "Wisp / TCG"]
    header += ["interpreter ns", "x native"] if options.interpreter else []
    table(f"Guest user mode on the software CPU, ns of one operation, medians of {options.runs} runs", header, rows,
          [shown(command) for command in commands.values()])
    for failure in failures:
        print(f"\nFAILED {failure}")
    sys.exit(1 if failures else 0)


main()
