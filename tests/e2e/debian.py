#!/usr/bin/python3
"""debian.py --vmm PROGRAM --images DIR [--accel soft] [--kernels A,B] [--cpus N,N] [--boots N] [--parts A,B]
          [--nice N]

A Debian as its users have it, on an ext4 file system with a journal: stock kernels (`cloud` and `generic`, as bzImage
and without words that make them quicker), systemd, a login with a password on the serial console.

  use    on 1, 2 and 4 processors: apt, Python, gcc with threads, sysbench, fio with verification on a virtio disk and
         on the file system, iperf3 both ways through a tap and through passt, the clock, a power-off, e2fsck
  boots  ten in a row on one disk, on 1 and 4 processors, that are to differ neither in the console's text nor in the
         units that systemd started nor in what the kernel logged as warnings

scripts/debian-check calls this in a network with what is named below.
"""
import argparse
import base64
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True

from harness import (Checks, Context, Failure, IperfServer, Machine, main_summary, pattern_file,  # noqa: E402
                     sha256_of)

KERNELS = {"cloud": ("bzImage", "initrd.img"), "generic": ("generic/bzImage", "generic/initrd.img")}
APPEND = "console=ttyS0 quiet root=/dev/vda rw init=/sbin/init"
PROMPT = r"root@wisp:[^\n]*# "
TAP, TAP_HOST, TAP_GUEST = "wispdeb", "10.7.0.1", "10.7.0.2"
USER_HOST, USER_GUEST = "10.8.0.1", "10.8.0.2"
TAP_MAC, USER_MAC = "52:54:00:12:34:56", "52:54:00:12:34:57"
DATA_MIB = 96
SECONDS = 3  # that each measuring program runs
TROUBLE = re.compile(r"BUG:|WARNING:|Call Trace|Oops|soft lockup|rcu.*stall|unstable|blocked for more|I/O error|segfault"
                     r"|general protection|trap invalid opcode|EXT4-fs (error|warning)", re.IGNORECASE)

# Integers of any size, floating point, decimals, text, compression, threads: what it prints is the same everywhere.
PYTHON = r"""
import decimal, hashlib, json, math, re, threading, zlib
h = hashlib.sha256()
h.update(hex(pow(3, 20011) * pow(7, 9973) // pow(5, 7919)).encode())
h.update(repr([math.sqrt(i) / (1 + i * i / 50) - math.fmod(i, 0.7) for i in range(2000)]).encode())
decimal.getcontext().prec = 400
h.update(str(decimal.Decimal(2).sqrt() / decimal.Decimal(3).ln()).encode())
h.update(json.dumps({str(i): [i, i / 7, hex(i)] for i in range(3000)}, sort_keys=True).encode())
data = b''.join(i.to_bytes(3, 'little') for i in range(60000))
assert zlib.decompress(zlib.compress(data, 9)) == data
h.update(str(zlib.crc32(data)).encode())
h.update(re.sub(r'(\d)(\d)', r'\2\1', str(2 ** 5000)).encode())
sieve = bytearray([1]) * 300000
for i in range(2, 548):
    if sieve[i]:
        sieve[i * i::i] = bytes(len(range(i * i, 300000, i)))
h.update(bytes(sieve))
total, lock = 0, threading.Lock()
def add(first):
    global total
    for i in range(first, 200000, 4):
        with lock:
            total += i
threads = [threading.Thread(target=add, args=(i,)) for i in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
print(h.hexdigest(), total)
"""

# Threads that share a counter by atomics and another by a mutex, hand a token round by condition variables, and sort;
# processes that answer through pipes. Prints sums that do not depend on who was first.
PROGRAM = r"""
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
enum { THREADS = 8, ROUNDS = 100000, HANDS = 2000, NUMBERS = 100000 };
static atomic_long counted;
static long guarded;
static int turn;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static int compare(const void* a, const void* b) {
  const uint32_t x = *(const uint32_t*)a, y = *(const uint32_t*)b;
  return (x > y) - (x < y);
}
static uint64_t sorted(uint32_t seed) {
  uint32_t* numbers = malloc(NUMBERS * sizeof *numbers);
  for (int i = 0; i < NUMBERS; ++i) {
    seed ^= seed << 13, seed ^= seed >> 17, seed ^= seed << 5;
    numbers[i] = seed;
  }
  qsort(numbers, NUMBERS, sizeof *numbers, compare);
  uint64_t hash = 14695981039346656037u;
  for (int i = 0; i < NUMBERS; ++i) hash = (hash ^ numbers[i]) * 1099511628211u;
  free(numbers);
  return hash;
}
static void* work(void* argument) {
  const int self = (int)(intptr_t)argument;
  for (int i = 0; i < ROUNDS; ++i) {
    atomic_fetch_add(&counted, i & 7);
    if (i % 16 == 0) {
      pthread_mutex_lock(&mutex);
      guarded += self + 1;
      pthread_mutex_unlock(&mutex);
    }
  }
  for (int i = 0; i < HANDS; ++i) {
    pthread_mutex_lock(&mutex);
    while (turn != self) pthread_cond_wait(&cond, &mutex);
    turn = (turn + 1) % THREADS;
    pthread_cond_broadcast(&cond);
    pthread_mutex_unlock(&mutex);
  }
  return (void*)(intptr_t)sorted(2463534242u + self);
}
int main(void) {
  pthread_t threads[THREADS];
  uint64_t sum = 0;
  for (int i = 0; i < THREADS; ++i) pthread_create(&threads[i], NULL, work, (void*)(intptr_t)i);
  for (int i = 0; i < THREADS; ++i) {
    void* result;
    pthread_join(threads[i], &result);
    sum += (uint64_t)(intptr_t)result;
  }
  uint64_t children = 0;
  for (int i = 0; i < 8; ++i) {
    int ends[2];
    if (pipe(ends) != 0) return 1;
    if (fork() == 0) {
      const uint64_t hash = sorted(88675123u + i);
      _exit(write(ends[1], &hash, sizeof hash) != sizeof hash);
    }
    uint64_t hash;
    int status;
    if (read(ends[0], &hash, sizeof hash) != sizeof hash || wait(&status) < 0 || status != 0) return 2;
    close(ends[0]), close(ends[1]);
    children += hash;
  }
  double series = 0;
  for (int i = 1; i <= 1000000; ++i) series += 1.0 / ((double)i * i);
  printf("%ld %ld %d %016llx %016llx %.12f\n", atomic_load(&counted), guarded, turn, (unsigned long long)sum,
         (unsigned long long)children, series);
}
"""


def expected_of_program():
    """What PROGRAM prints, computed here."""
    threads, rounds, numbers, mask = 8, 100000, 100000, (1 << 64) - 1

    def hash_of(seed):
        values = []
        for _ in range(numbers):
            seed ^= seed << 13 & 0xFFFFFFFF
            seed ^= seed >> 17
            seed ^= seed << 5 & 0xFFFFFFFF
            values.append(seed)
        result = 14695981039346656037
        for value in sorted(values):
            result = (result ^ value) * 1099511628211 & mask
        return result

    series = 0.0
    for i in range(1, 1000001):
        series += 1.0 / (float(i) * i)
    counted = threads * sum(i & 7 for i in range(rounds))
    guarded = sum(range(1, threads + 1)) * len(range(0, rounds, 16))
    sums = [sum(hash_of(seed + i) for i in range(8)) & mask for seed in (2463534242, 88675123)]
    return f"{counted} {guarded} 0 {sums[0]:016x} {sums[1]:016x} {series:.12f}"


class Debian:
    """One machine on `root`; its shell after `log_in`."""

    def __init__(self, context, kernel, cpus, root, append=APPEND):
        image, initrd = KERNELS[kernel]
        self.machine = Machine(context, kernel=image, initrd=initrd, memory=1024, cpus=cpus, base=append)
        self.machine.disk("root", root, options="direct=off")

    def log_in(self, limit):
        console = self.machine.console
        console.expect(r"wisp login: ", limit)
        seconds = time.monotonic() - self.machine.started
        console.send("root\n")
        console.expect("Password: ", limit)
        console.send("wisp\n")
        console.expect(PROMPT, limit)
        # All of the console until here is the guest's own; what follows has commands in it.
        text = console.text
        console.send("stty -echo; export PAGER=cat SYSTEMD_COLORS=0 PS1='WISP''# '\n")
        console.wait_shell(limit)
        return seconds, text

    def processor_time(self):
        """What the VMM has taken of the host: says more than the time on the wall where the host has other work."""
        with open(f"/proc/{self.machine.process.pid}/stat", encoding="ascii") as file:
            user, system = file.read().rsplit(")", 1)[1].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def power_off(self, limit=90):
        self.machine.console.send("systemctl poweroff\n")
        return self.machine.wait(limit)

    def put(self, path, text):
        data = base64.b64encode(text.encode()).decode()
        self.machine.console.output_of(f"rm -f {path}.b64", 30)
        for start in range(0, len(data), 900):
            self.machine.console.output_of(f"echo {data[start:start + 900]} >>{path}.b64", 30)
        self.machine.console.output_of(f"base64 -d {path}.b64 >{path}", 30)


def copy_of(context, name="debian-full.ext4"):
    path = context.unique("root")
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", context.image(name), path], check=True)
    return path


def check_file_system(checks, path):
    result = subprocess.run(["e2fsck", "-fn", path], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                            check=False)
    checks.check("e2fsck finds nothing", result.returncode == 0, result.stdout + result.stderr)


def number(pattern, text):
    match = re.search(pattern, text)
    return float(match[1]) if match else 0.0


def use(checks, context, kernel, cpus, expected):
    """All that the module's first lines say of `use`."""
    root, data = copy_of(context), context.path("data.img")
    pattern_file(data, DATA_MIB << 20)
    debian = Debian(context, kernel, cpus, root)
    machine = debian.machine.disk("data", data, options="direct=off")
    machine.tap(TAP, mac=TAP_MAC)
    machine.add("-netdev", "user,id=net1", "-device", f"virtio-net-device,netdev=net1,id=net1,mac={USER_MAC}")
    with machine:
        machine.start()
        seconds, _ = debian.log_in(180)
        print(f"        login prompt after {seconds:.1f} s, {debian.processor_time():.1f} s of processor time at the shell",
              flush=True)
        system(checks, machine.console, kernel, cpus)
        programs(checks, debian, expected)
        sysbench(checks, machine.console, cpus)
        disk_sum = fio(checks, machine.console)
        network(checks, context, machine.console, cpus)
        # Without times: the console's reader drops lines that begin with one.
        log = machine.console.output_of("dmesg -t", 60)
        bad = [line for line in log.split("\n") if TROUBLE.search(line)]
        checks.check("the kernel's log has nothing of trouble", "Linux version" in log and not bad, "\n".join(bad))
        checks.equal("exit status after power-off", debian.power_off(), 0)
    checks.equal("the disk has on the host what the guest saw", sha256_of(data), disk_sum)
    check_file_system(checks, root)
    os.unlink(root)


def system(checks, console, kernel, cpus):
    checks.equal("systemd is running", console.run("systemctl is-system-running --wait", 180), (0, "running"))
    checks.equal("no unit failed", console.output_of("systemctl --failed --plain --no-legend", 60), "")
    release = console.output_of("uname -r")
    checks.check("the kernel is the one asked for", ("cloud" in release) == (kernel == "cloud"), release)
    checks.equal("processors", console.output_of("nproc"), str(cpus))
    checks.equal("the root file system", console.output_of("findmnt -no FSTYPE /"), "ext4")


def programs(checks, debian, expected):
    console = debian.machine.console
    text = console.output_of("apt --version", 60)
    checks.check("apt --version", re.match(r"apt \d+\.\d+", text), text)
    debian.put("/root/sums.py", PYTHON)
    checks.equal("python3 computes", console.run("python3 /root/sums.py", 120), (0, expected["python"]))
    debian.put("/root/sums.c", PROGRAM)
    for options in ("-O0", "-O3 -march=native -Wall -Werror"):
        checks.equal(f"gcc {options}", console.run(f"gcc {options} -pthread -o /root/sums /root/sums.c", 180), (0, ""))
        checks.equal(f"and its program's sums ({options})", console.run("/root/sums", 120), (0, expected["program"]))


def sysbench(checks, console, cpus):
    common = f"--threads={cpus} --time={SECONDS}"
    for name, arguments, pattern in (
            ("cpu", "--cpu-max-prime=10000", r"events per second: +([\d.]+)"),
            ("memory", "--memory-total-size=100T", r"\(([\d.]+) MiB/sec\)"),
            ("threads", "--thread-locks=2", r"total number of events: +(\d+)"),
            ("mutex", "--mutex-loops=1000", r"total number of events: +(\d+)")):
        status, text = console.run(f"sysbench {name} {common} {arguments} run", 120)
        value = number(pattern, text)
        checks.check(f"sysbench {name}", status == 0 and value > 0, text)
        print(f"        {value:.0f}", flush=True)


def fio(checks, console):
    """Writes and reads back what it wrote, by several engines; returns the checksum of the disk."""
    # By size: which name a disk has depends on the order in which the kernel finds them.
    disk = console.output_of(f"grep -lx {DATA_MIB * 2048} /sys/block/vd*/size | cut -d/ -f4").strip()
    verify = "--verify=crc32c --verify_fatal=1 --do_verify=1 --output-format=normal"
    for name, arguments in (
            ("randwrite with verify on the disk", f"--filename=/dev/{disk} --rw=randwrite --bs=4k --size=64M --direct=1"
             f" --ioengine=libaio --iodepth=32 {verify}"),
            ("mixed sizes with verify on the disk", f"--filename=/dev/{disk} --rw=randwrite --bsrange=4k-128k --size=32M"
             f" --offset=64M --direct=1 --ioengine=libaio --iodepth=8 {verify}"),
            ("randread on the disk", f"--filename=/dev/{disk} --readonly --rw=randread --bs=4k --direct=1"
             f" --ioengine=libaio --iodepth=32 --time_based --runtime={SECONDS}"),
            ("read on the disk", f"--filename=/dev/{disk} --readonly --rw=read --bs=256k --direct=1 --ioengine=psync"
             f" --time_based --runtime={SECONDS}"),
            ("randwrite with verify on ext4", "--filename=/root/fio.dat --rw=randwrite --bs=4k --size=32M --fsync=64"
             f" --ioengine=psync {verify}"),
            ("mmap with verify on ext4", "--filename=/root/fio.dat --rw=randwrite --bs=4k --size=32M --ioengine=mmap"
             f" {verify}")):
        status, text = console.run(f"fio --name=job {arguments}", 240)
        checks.check(f"fio {name}", status == 0 and "err= 0" in text, text)
        print("        " + "; ".join(re.findall(r"(?:read|write): IOPS=\S+ BW=\S+|clat \(\w+\): min=.* max= *\S+",
                                               text.replace(",", ""))), flush=True)
    console.output_of("rm /root/fio.dat; sync", 60)
    # Past the page cache: what the disk gives, not what was read before.
    return console.output_of(f"dd if=/dev/{disk} bs=1M iflag=direct status=none | sha256sum | cut -d' ' -f1", 120)


def network(checks, context, console, cpus):
    def interface(mac):
        return console.output_of(f"grep -l {mac} /sys/class/net/*/address | cut -d/ -f5").strip()

    # The second size is what passt's DHCP would say.
    for way, mac, guest, host, bind, mtu in (("a tap", TAP_MAC, TAP_GUEST, TAP_HOST, TAP_HOST, 1500),
                                             ("passt", USER_MAC, USER_GUEST, USER_HOST, "127.0.0.1", 65520)):
        name = interface(mac)
        console.output_of(f"ip addr add {guest}/24 dev {name} && ip link set {name} mtu {mtu} up", 60)
        for direction, option in (("to the host", ""), ("from the host", "-R"), ("both ways at once", "--bidir")):
            with IperfServer(bind):
                status, text = console.run(f"iperf3 -c {host} -t {SECONDS} -f m -P {cpus} {option}", 120)
            rates = [float(rate) for rate in re.findall(r"([\d.]+) Mbits/sec +receiver", text)]
            checks.check(f"iperf3 through {way} {direction}", status == 0 and rates and min(rates) > 0, text)
            print(f"        {'; '.join(f'{rate:.0f}' for rate in rates)} Mbit/s", flush=True)


def plain(text):
    """Text without what may differ between two boots: numbers, and what only arranges them."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>78]", "", text.replace("\r", ""))
    text = re.sub(r"\b(0x)?[0-9a-f]*\d\w*\b", "N", text)
    # What udev loads side by side is numbered as it comes: input0, input1.
    text = re.sub(r"(?<=[a-z])\d+\b", "N", text)
    return re.sub(r"[ \t]+", " ", text)


def boot_once(checks, context, kernel, cpus, root):
    """One boot to the shell and a power-off; what of it is compared, by name."""
    # Without a limit to how much systemd may say by /dev/kmsg: the limit goes by time.
    debian = Debian(context, kernel, cpus, root, append=f"{APPEND} printk.devkmsg=on")
    with debian.machine as machine:
        machine.start()
        seconds, console = debian.log_in(180)
        run = machine.console.output_of
        found = {"the console's text": plain(console)}
        machine.console.run("systemctl is-system-running --wait", 180)
        found["the state of systemd"] = machine.console.run("systemctl is-system-running", 60)[1]
        found["failed units"] = run("systemctl --failed --plain --no-legend", 60)
        # Until journald listens, systemd speaks by /dev/kmsg; the journal has both.
        found["started units"] = "\n".join(sorted({plain(line) for line in run(
            "journalctl -b -o cat SYSLOG_IDENTIFIER=systemd | "
            "grep -E '^(Started|Finished|Reached|Mounted|Listening|Found|Created|Set up|Activated)'", 60).split("\n")}))
        found["active units"] = "\n".join(sorted(" ".join(line.split()[:4]) for line in run(
            "systemctl list-units --state=active --plain --no-legend --full", 60).split("\n")))
        for name, option in (("warnings in the kernel's log", "--level=emerg,alert,crit,err,warn"),
                             ("the kernel's log", "")):
            # As a set: what is probed side by side comes in any order. What systemd says there is among the units,
            # and that an interrupt took long says only that the host had other work.
            found[name] = "\n".join(sorted({plain(line) for line in run(f"dmesg -t {option}", 60).split("\n")
                                            if not line.startswith(("systemd", "hrtimer: interrupt took"))}))
        status = debian.power_off()
        errors = machine.error_text()
    found["the exit status"] = status
    found["what the VMM said"] = plain(errors)
    check_file_system(checks, root)
    return seconds, found


def boots(checks, context, kernel, cpus, count):
    root = copy_of(context)
    # The first start of an image makes what later ones find.
    boot_once(checks, context, kernel, cpus, root)
    first, times = None, []
    for index in range(count):
        seconds, found = boot_once(checks, context, kernel, cpus, root)
        times.append(seconds)
        print(f"        boot {index + 1}: login prompt after {seconds:.1f} s", flush=True)
        if first is None:
            first = found
            checks.equal("no unit failed", found["failed units"], "")
            checks.equal("systemd is running", found["the state of systemd"], "running")
            checks.equal("exit status after power-off", found["the exit status"], 0)
            for key, value in found.items():
                print(f"        {key}: " + str(value).replace("\n", "\n          "), flush=True)
        for key, value in found.items():
            if value == first[key]:
                continue
            before, after = (str(text).split("\n") for text in (first[key], value))
            checks.check(f"boot {index + 1} is the first again: {key}", False, "\n".join(
                [f"- {line}" for line in before if line not in after] + [f"+ {line}" for line in after if line not in before]))
        checks.check(f"boot {index + 1} ends", found == first)
    print(f"        login prompt after {min(times):.1f} to {max(times):.1f} s", flush=True)
    os.unlink(root)


def expected_values():
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(PYTHON)
        file.flush()
        text = subprocess.run([sys.executable, file.name], check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"python": text.strip(), "program": expected_of_program()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vmm", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--accel", default="soft")
    parser.add_argument("--kernels", default="cloud,generic")
    parser.add_argument("--cpus", default="1,2,4")
    parser.add_argument("--boots", type=int, default=10)
    parser.add_argument("--parts", default="use,boots")
    parser.add_argument("--nice", type=int, default=0, help="below 0, as root, for a busy host: systemd's limits are of"
                        " this world's seconds")
    options = parser.parse_args()
    os.nice(options.nice)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    checks = Checks()
    work = tempfile.mkdtemp(prefix="wisp-debian-", dir=os.environ.get("TMPDIR", "/var/tmp"))
    try:
        context = Context(options.vmm, options.images, options.accel, work)
        kernels, cpus = options.kernels.split(","), [int(value) for value in options.cpus.split(",")]
        if "use" in options.parts.split(","):
            expected = expected_values()
            for kernel in kernels:
                for value in cpus:
                    checks.run(f"{kernel}, {value} CPUs", use, context, kernel, value, expected)
        if "boots" in options.parts.split(","):
            for kernel in kernels:
                for value in sorted({min(cpus), max(cpus)}):
                    checks.run(f"{kernel}, {value} CPUs, boots", boots, context, kernel, value, options.boots)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    main_summary(checks, "debian")


main()
