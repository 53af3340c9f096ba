#!/usr/bin/python3
"""bench/system_mode.py [--runs N] [--cpus N] [--seconds S] [--parts A,B] [--nice N]

A Debian system on the software CPU beside QEMU's TCG (Nehalem and max), the machines taking turns, each on its own
throw-away copy of debian.ext4: from the start of the process to systemd's login prompt and its root shell; then, in the
same guest, sysbench, fio on a second virtio disk and iperf3 to and from the host through a tap. Medians of the runs.
All of it runs in a network namespace of its own. What a machine cannot do is said below the table, with its command;
the exit status is then 1.
"""
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

from common import APPEND, images, is_qemu, parser, shown, soft_command, summary, table
from harness import Console, Failure, IperfServer, die_with_parent, pattern_file

PARTS = ("boot", "sysbench", "fio", "iperf3")
TAP, HOST, GUEST = "wispbench", "10.7.0.1", "10.7.0.2"
DATA_MIB = 256
# name, unit, whether more is better; in the order of the table.
ROWS = {
    "login": ("process start to login prompt", "s", False),
    "shell": ("process start to root shell", "s", False),
    "systemd": ("of it from the kernel's init to the shell", "s", False),
    "spent": ("processor time of the VMM until the shell", "s", False),
    "cpu": ("sysbench cpu --cpu-max-prime=10000", "events/s", True),
    "memory": ("sysbench memory, 1 KiB blocks", "MiB/s", True),
    "fio1": ("fio 4k randread, psync", "IOPS", True),
    "fio32": ("fio 4k randread, libaio, depth 32", "IOPS", True),
    "send": ("iperf3, guest to host", "Mbit/s", True),
    "receive": ("iperf3, host to guest", "Mbit/s", True),
}


def own_network():
    """Runs this program again in a network of its own, with a tap that both VMMs can use."""
    if os.environ.get("WISP_BENCH_NETWORK"):
        return
    words = ["unshare", "--net"] + ([] if os.getuid() == 0 else ["--map-root-user"])
    script = (f"ip link set lo up && ip tuntap add {TAP} mode tap && ip addr add {HOST}/24 dev {TAP} && "
              f"ip link set {TAP} up && exec \"$@\"")
    os.environ["WISP_BENCH_NETWORK"] = "1"
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    os.execvp(words[0], [*words, "sh", "-c", script, "sh", sys.executable, *sys.argv])


def machine_command(program, folder, root, data, cpus, cpu):
    append = f"{APPEND} root=/dev/vda rw init=/sbin/init"
    command = soft_command(program, folder, append, memory=1024, cpus=cpus, cpu=cpu)
    qemu = is_qemu(program)
    for name, file in (("root", root), ("data", data)):
        drive = f"file={file},id={name}" + (",if=none,format=raw,aio=io_uring" if qemu else ",direct=off,aio=io_uring")
        command += ["-drive", drive, "-device", f"virtio-blk-device,drive={name},id=blk-{name}"]
    return command + ["-netdev", f"tap,id=net0,ifname={TAP}" + (",script=no,downscript=no" if qemu else ""),
                      "-device", "virtio-net-device,netdev=net0,id=nic0,mac=52:54:00:12:34:56"]


def number(pattern, text):
    match = re.search(pattern, text)
    if not match:
        raise Failure(f"no {pattern!r} in:\n{text[-800:]}")
    return float(match[1])


class Guest:
    """One machine from start to power-off; `found` maps keys of ROWS to figures, `failures` is what it did not do."""

    def __init__(self, command, options, serve):
        self.command, self.options, self.serve = command, options, serve
        self.found, self.failures = {}, []

    def measure(self):
        def in_child():
            die_with_parent()
            os.nice(self.options.nice)

        with tempfile.TemporaryFile() as errors:
            started = time.monotonic()
            process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                                       preexec_fn=in_child)
            self.console = Console(process.stdin.fileno(), process.stdout.fileno())
            try:
                self.boot(process.pid, started)
                for part, function in (("sysbench", self.sysbench), ("fio", self.fio), ("iperf3", self.iperf3)):
                    if part in self.options.parts:
                        self.attempt(part, function)
                self.attempt("clock", self.check_clock)
                self.attempt("power-off", self.power_off, process)
            except Failure as error:
                errors.seek(0)
                self.failures.append(f"boot: {error}\n{errors.read().decode(errors='replace')[-800:]}")
            finally:
                process.kill()
                process.wait()
                process.stdin.close()
                process.stdout.close()
        return self

    def attempt(self, what, function, *arguments):
        try:
            function(*arguments)
        except Failure as error:
            self.failures.append(f"{what}: {error}")
            if what in PARTS:
                # The shell may still be in the command that did not end. What follows ^C too closely is lost with it.
                self.console.send("\x03")
                time.sleep(2)

    def boot(self, pid, started):
        console = self.console
        console.expect("WISP-INIT", self.options.limit)
        init = time.monotonic() - started
        console.expect("login:", self.options.limit)
        self.found["login"] = time.monotonic() - started
        console.expect(r"root@\w+:~# ", self.options.limit)
        self.found["shell"] = time.monotonic() - started
        self.found["systemd"] = self.found["shell"] - init
        # Says more than the time on the wall where the host has other work.
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            user, system = file.read().rsplit(")", 1)[1].split()[11:13]
        self.found["spent"] = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
        console.send("export PS1='WISP# '; stty -echo\n")
        console.wait_shell(60)
        self.clock = self.clocks()
        # What is measured next should not share the processor with the rest of the start.
        console.run("systemctl is-system-running --wait", self.options.limit)

    def clocks(self):
        """The guest's clock, and the host's before and after it was read."""
        before = time.monotonic()
        guest = number(r"(\d+\.\d+)", self.console.output_of("cat /proc/uptime", 60))
        return guest, before, time.monotonic()

    def check_clock(self):
        first, last = self.clock, self.clocks()
        counted, least, most = last[0] - first[0], last[1] - first[2], last[2] - first[1]
        if counted < least * 0.97 - 0.1 or counted > most * 1.03 + 0.1:
            raise Failure(f"the guest counted {counted:.2f} s in {least:.2f} to {most:.2f} s")

    def timed(self, command):
        """The output of a command that measures for options.seconds."""
        return self.console.output_of(command, self.options.limit + self.options.seconds)

    def sysbench(self):
        common = f"--threads={self.options.cpus} --time={self.options.seconds}"
        text = self.timed(f"sysbench cpu --cpu-max-prime=10000 {common} run")
        self.found["cpu"] = number(r"events per second: +([\d.]+)", text)
        text = self.timed(f"sysbench memory --memory-block-size=1K --memory-total-size=100T {common} run")
        self.found["memory"] = number(r"\(([\d.]+) MiB/sec\)", text)

    def fio(self):
        # By size: which name a disk has depends on the order in which the kernel finds them.
        disk = self.console.output_of(f"grep -lx {DATA_MIB * 2048} /sys/block/vd*/size | cut -d/ -f4").strip()
        for key, engine in (("fio1", "psync"), ("fio32", "libaio --iodepth=32")):
            text = self.timed(f"fio --name=r --filename=/dev/{disk} --readonly --rw=randread --bs=4k --direct=1 "
                              f"--time_based --runtime={self.options.seconds} --ioengine={engine} --minimal | cut -d';' -f8")
            self.found[key] = number(r"(?m)^(\d+)\s*$", text)

    def iperf3(self):
        run = self.console.output_of
        run(f"ip addr add {GUEST}/24 dev $(ls /sys/class/net | grep -v lo | head -1)")
        run("ip link set $(ls /sys/class/net | grep -v lo | head -1) up; for i in 1 2 3 4 5 6 7 8 9 10; do "
            f"ping -c 1 -W 1 -q {HOST} >/dev/null && break; done", 60)
        for key, way in (("send", ""), ("receive", "-R")):
            with self.serve():
                text = self.timed(f"iperf3 -c {HOST} -t {self.options.seconds} -f m {way}")
            self.found[key] = number(r"([\d.]+) Mbits/sec +receiver", text)

    def power_off(self, process):
        self.console.send("systemctl poweroff\n")
        # QEMU's -no-reboot and Wisp both end with the guest.
        deadline = time.monotonic() + self.options.limit
        while process.poll() is None and time.monotonic() < deadline:
            self.console.pump(0.1)
        if process.poll() is None:
            raise Failure(f"still runs after {self.options.limit:.0f} s; the console ends with:\n{self.console.tail()}")
        if process.returncode != 0:
            raise Failure(f"the VMM ended with status {process.returncode}")


def figure(value):
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--runs", type=int, default=3)
    arguments.add_argument("--cpus", type=int, default=1)
    arguments.add_argument("--seconds", type=int, default=5, help="that each program in the guest runs")
    arguments.add_argument("--parts", default=",".join(PARTS), help="of %(default)s (boot is always done)")
    arguments.add_argument("--limit", type=float, default=180, help="seconds for each step (default: %(default)s)")
    arguments.add_argument("--nice", type=int, default=0, help="for all alike; below 0 for a busy host, as root")
    options = arguments.parse_args()
    options.parts = options.parts.split(",")
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        sys.exit(f"system_mode.py: no part '{unknown[0]}'; there are {', '.join(PARTS)}")
    if "iperf3" in options.parts and not shutil.which("iperf3"):
        sys.exit("system_mode.py: iperf3 is not installed; scripts/setup --dev --no-build installs it")
    # Before there is a network without a way out: images may have to be fetched.
    folder = options.images or images("kernel", "initrd", "debian")
    own_network()
    machines = (("Wisp", options.vmm, ""), ("TCG Nehalem", options.qemu, "Nehalem"), ("TCG max", options.qemu, "max"))
    found = {name: {key: [] for key in ROWS} for name, _, _ in machines}
    failures, commands = [], {}
    with tempfile.TemporaryDirectory(prefix="wisp-bench-", dir=os.environ.get("TMPDIR", "/var/tmp")) as work:
        data = os.path.join(work, "data.img")
        pattern_file(data, DATA_MIB << 20)
        for _ in range(options.runs):
            for name, program, cpu in machines:
                root = os.path.join(work, "root.img")
                subprocess.run(["cp", "--sparse=always", os.path.join(folder, "debian.ext4"), root], check=True)
                command = machine_command(program, folder, root, data, options.cpus, cpu)
                commands[name] = command
                guest = Guest(command, options, lambda: IperfServer(HOST, options.nice)).measure()
                os.unlink(root)
                for key, value in guest.found.items():
                    found[name][key].append(value)
                for failure in guest.failures:
                    failures.append(f"{name}: {failure}\n    {shown(command)}")
                    print(f"system_mode.py: {name}: {failure}", file=sys.stderr, flush=True)
    rows = []
    for key, (title, unit, more) in ROWS.items():
        medians = [summary(found[name][key])[0] if found[name][key] else math.nan for name, _, _ in machines]
        if all(math.isnan(value) for value in medians):
            continue
        peers = [value for value in medians[1:] if not math.isnan(value)]
        best = (max if more else min)(peers) if peers else math.nan
        figures = ["failed" if math.isnan(value) else figure(value) for value in medians]
        of_best = medians[0] / best
        rows.append([f"{title}, {unit}", *figures, "" if math.isnan(of_best) else f"{of_best:.2f}",
                     "more" if more else "less"])
    table(f"Debian on the software CPU, {options.cpus} vCPU, medians of {options.runs} runs",
          ("what", "Wisp", "TCG Nehalem", "TCG max", "Wisp / better TCG", "better is"), rows,
          [shown(command) for command in commands.values()])
    for failure in failures:
        print(f"\nFAILED {failure}")
    sys.exit(1 if failures else 0)


main()
