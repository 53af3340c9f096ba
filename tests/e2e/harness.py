"""What the end-to-end tests are written with: machines under a VMM, their console, their QMP socket, and checks.

Standard library only. A machine is described once (`Machine`) and can be started by Wisp or, for comparison and for
trying the tests themselves, by QEMU's microvm; the two differ in a few options only.
"""
import codecs
import collections
import ctypes
import hashlib
import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time

KERNEL_LINE = re.compile(r"^\[ *\d+\.\d+\]")


class Failure(Exception):
    """What a test cannot go on after."""


# The nested bed (scripts/nested), whose init makes this folder.
IN_BED = os.path.isdir("/scratch")


class Checks:
    """Counts what held and what did not; every check is one line of output."""

    def __init__(self):
        self.passed = 0
        self.failed = 0
        self.group = ""

    def check(self, name, holds, detail=""):
        full = f"{self.group}: {name}" if self.group else name
        if holds:
            self.passed += 1
            print(f"ok      {full}", flush=True)
        else:
            self.failed += 1
            text = f"{detail}".strip()
            print(f"FAILED  {full}" + ("\n        " + text.replace("\n", "\n        ") if text else ""), flush=True)
        return bool(holds)

    def equal(self, name, found, expected):
        return self.check(name, found == expected, f"expected {expected!r}\nfound    {found!r}")

    def run(self, group, function, context, *arguments):
        """Runs one group; an error inside is one failed check, and the next group still runs."""
        self.group = group
        started = time.monotonic()
        before = self.passed, self.failed
        context.fell_over = False
        self._attempt(function, context, *arguments)
        if self.failed > before[1] and context.fell_over and IN_BED:
            # QEMU's emulation of SVM ends a guest this way now and then, whichever version of the VMM runs it, and
            # nothing but the bed has been seen to do so.
            print(f"        {group}: the guest fell over (triple fault) on the bed's emulated processor; once more",
                  flush=True)
            self.passed, self.failed = before
            self._attempt(function, context, *arguments)
        print(f"        {group} took {time.monotonic() - started:.1f} s", flush=True)
        self.group = ""

    def _attempt(self, function, *arguments):
        try:
            function(self, *arguments)
        except (Failure, OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
            self.check("runs to its end", False, f"{type(error).__name__}: {error}")


def die_with_parent():
    """Nothing that a test starts outlives it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


class Context:
    """Where things are and which VMM is under test."""

    def __init__(self, vmm, images, accel="kvm", work=None):
        self.vmm = vmm
        self.is_qemu = os.path.basename(vmm).startswith("qemu")
        self.images = images
        self.accel = accel
        self.work = work or tempfile.mkdtemp(prefix="wisp-e2e-")
        self.patience = float(os.environ.get("WISP_E2E_PATIENCE", "1"))  # scales every time limit
        self.serial_number = 0
        self.fell_over = False  # a machine that failed its group had told of a triple fault
        self.kept = False  # whether an earlier machine left /root/kept and its checksum on the root disk

    def image(self, name):
        return os.path.join(self.images, name)

    def path(self, name):
        return os.path.join(self.work, name)

    def unique(self, stem):
        self.serial_number += 1
        return self.path(f"{stem}{self.serial_number}")


# What makes a guest start quicker where the CPU is emulated, and prints less; harmless elsewhere.
QUICK = "console=ttyS0 quiet tsc=reliable mitigations=off cryptomgr.notests panic=1"
SHELL = "init=/usr/lib/wisp/serial-shell"


class Machine:
    """One VMM process. Options are added as lists of words; `start` runs it with its console on pipes."""

    def __init__(self, context, kernel="vmlinux", append="", initrd="initrd.img", memory=256, cpus=1, base=QUICK):
        self.context = context
        self.qmp_path = context.unique("qmp")
        self.words = []
        self.process = None
        self.console = None
        self.started = None
        if context.is_qemu:
            self.words += ["-M", "microvm", "-cpu", "host", "-bios", "qboot.rom", "-nodefaults", "-no-user-config",
                           "-display", "none", "-accel", context.accel]
        else:
            self.words += ["-machine", "microvm", "-accel", context.accel]
        self.words += ["-smp", str(cpus), "-m", str(memory), "-kernel", context.image(kernel)]
        if initrd:
            self.words += ["-initrd", context.image(initrd)]
        self.words += ["-append", f"{base} {append}".strip()]
        self.words += ["-qmp", f"unix:{self.qmp_path},server" + ("=on,wait=off" if context.is_qemu else ",nowait")]
        self.words += ["-serial", "stdio"]

    def add(self, *words):
        self.words += [str(word) for word in words]
        return self

    def disk(self, name, file, readonly=False, options=""):
        mode = ("on" if readonly else "off")
        extra = "," + options if options else ""
        if self.context.is_qemu:
            extra = ",if=none,format=raw" + extra.replace("direct=on", "cache.direct=on").replace("direct=off", "")
            extra = extra.replace(",,", ",").rstrip(",")
        return self.add("-drive", f"file={file},id={name},readonly={mode}{extra}",
                        "-device", f"virtio-blk-device,drive={name},id={name}")

    def tap(self, interface, mac="52:54:00:12:34:56", options=""):
        scripts = ",script=no,downscript=no" if self.context.is_qemu else ""
        return self.add("-netdev", f"tap,id=net0,ifname={interface}{scripts}{options}",
                        "-device", f"virtio-net-device,netdev=net0,id=net0,mac={mac}")

    def command(self):
        # WISP_E2E_OPTIONS: more options for every machine, to look into a failure (-disable-seccomp, ...).
        return [self.context.vmm] + self.words + shlex.split(os.environ.get("WISP_E2E_OPTIONS", ""))

    def start(self, pass_fds=()):
        self.started = time.monotonic()
        self.errors = open(self.context.unique("stderr"), "w+b")
        self.process = subprocess.Popen(self.command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors, pass_fds=pass_fds, preexec_fn=die_with_parent)
        self.console = Console(self.process.stdin.fileno(), self.process.stdout.fileno(), self.context.patience)
        return self

    def error_text(self):
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace")

    def qmp(self):
        return Qmp(self.qmp_path, self.context.patience)

    def wait(self, seconds=20):
        """The exit status; the console is read meanwhile, since a full pipe would hold the machine up."""
        deadline = time.monotonic() + seconds * self.context.patience
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                self.console.drain()
                return self.process.returncode
            self.console.pump(0.05)
        raise Failure(f"the VMM still runs after {seconds} s; its console ends with:\n{self.console.tail()}")

    def end(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process:
            self.process.stdin.close()
            self.process.stdout.close()
            self.errors.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if error is not None and self.process:
            text = self.error_text().strip()
            self.context.fell_over = self.context.fell_over or "triple fault" in text
            status = self.process.poll()
            how = "the VMM still runs" if status is None else f"the VMM ended with {describe_status(status)}"
            print(f"        {how}; its command: {shlex.join(self.command())}\n        console: {self.console.tail()!r}"
                  + (f"\n        stderr: {text}" if text else ""))
            if status == -signal.SIGSYS:
                print(f"        the system call that the filter refused: {refused_call()}")
        self.end()


def describe_status(status):
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def refused_call():
    """The kernel's audit record of the last process that a system-call filter ended, where it can be read."""
    try:
        with open("/dev/kmsg", "rb", buffering=0) as log:
            os.set_blocking(log.fileno(), False)
            records = []
            while record := log.read(8192):
                records.append(record)
    except OSError:
        return "unknown (no /dev/kmsg)"
    except BlockingIOError:
        pass
    last = [record for record in records if b"type=1326" in record]
    return last[-1].split(b";", 1)[1].split(b"\n")[0].decode(errors="replace") if last else "unknown"


class Console:
    """The serial console: waits for text, and runs commands in a shell whose prompt is `WISP# `."""

    def __init__(self, input_descriptor, output_descriptor, patience=1.0):
        self.input = input_descriptor
        self.output = output_descriptor
        self.patience = patience
        self.text = ""
        self.mark = 0  # what expect() has not consumed starts here
        self.count = 0
        self.at_end = False
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def pump(self, seconds):
        """Reads what comes within `seconds`; False when there was nothing."""
        ready, _, _ = select.select([self.output], [], [], seconds)
        if not ready or self.at_end:
            return False
        data = os.read(self.output, 65536)
        self.at_end = not data
        self.text += self.decode(data)
        return bool(data)

    def drain(self):
        while not self.at_end and self.pump(0.2):
            pass

    def tail(self, size=600):
        return self.text[-size:]

    def expect(self, pattern, seconds):
        """Waits until `pattern` appears after what was consumed before; returns the match."""
        deadline = time.monotonic() + seconds * self.patience
        expression = re.compile(pattern)
        while True:
            match = expression.search(self.text, self.mark)
            if match:
                self.mark = match.end()
                return match
            left = deadline - time.monotonic()
            if self.at_end or left <= 0:
                why = "the console ended" if self.at_end else f"{seconds} s passed"
                raise Failure(f"{why} without {pattern!r}; the console ends with:\n{self.tail()}")
            self.pump(min(left, 0.5))

    def send(self, text):
        data = text.encode()
        while data:
            data = data[os.write(self.input, data):]

    def wait_shell(self, seconds=60):
        self.expect("WISP# ", seconds)

    def start(self, command):
        """Types a command; `finish` with the returned mark gives what it printed."""
        self.count += 1
        mark = f"@@{self.count}"
        # The mark is put together by the shell, so that an echo of the line is not taken for it.
        self.send(f"{command}; printf '@@%s:%s\\n' {self.count} $?\n")
        return mark

    def finish(self, mark, seconds=30):
        begin = self.mark
        match = self.expect(re.escape(mark) + r":(\d+)\r?\n", seconds)
        text = self.text[begin:match.start()].replace("\r", "").removeprefix("WISP# ")
        lines = [line.removeprefix("WISP# ") for line in text.split("\n")]
        return int(match.group(1)), "\n".join(line for line in lines if not KERNEL_LINE.match(line)).strip()

    def run(self, command, seconds=30):
        """Runs a command in the guest; returns (status, output)."""
        return self.finish(self.start(command), seconds)

    def output_of(self, command, seconds=30):
        status, text = self.run(command, seconds)
        if status != 0:
            raise Failure(f"in the guest: `{command}` ended with {status}: {text}")
        return text


class QmpError(Failure):
    def __init__(self, command, error):
        super().__init__(f"QMP {command}: {error.get('class')}: {error.get('desc')}")
        self.kind = error.get("class")


class Qmp:
    """A client of the QMP socket, as short as the protocol allows."""

    def __init__(self, path, patience=1.0, seconds=10):
        self.patience = patience
        self.buffer = b""
        self.events = collections.deque()
        self.identity = 0
        deadline = time.monotonic() + seconds * patience
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(path)
                break
            except OSError as error:
                self.socket.close()
                if time.monotonic() > deadline:
                    raise Failure(f"QMP: cannot connect to {path}: {error}") from error
                time.sleep(0.02)
        self.greeting = self._read(seconds)
        self("qmp_capabilities")

    def _read(self, seconds):
        deadline = time.monotonic() + seconds * self.patience
        while b"\n" not in self.buffer:
            self.socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                data = self.socket.recv(65536)
            except TimeoutError as error:
                raise Failure(f"QMP: no answer within {seconds} s") from error
            if not data:
                raise Failure("QMP: the connection was closed")
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def __call__(self, command, seconds=10, fds=(), **arguments):
        """The command's `return`; names in `arguments` have _ for - where QMP has one (`node_name_`: node-name)."""
        self.identity += 1
        message = {"execute": command, "id": self.identity}
        if arguments:
            message["arguments"] = {key[:-1].replace("_", "-") if key.endswith("_") else key: value
                                    for key, value in arguments.items()}
        data = json.dumps(message).encode() + b"\n"
        if fds:
            socket.send_fds(self.socket, [data], list(fds))
        else:
            self.socket.sendall(data)
        while True:
            answer = self._read(seconds)
            if "event" in answer:
                self.events.append(answer)
            elif answer.get("id") == self.identity:
                if "error" in answer:
                    raise QmpError(command, answer["error"])
                return answer["return"]
            else:
                raise Failure(f"QMP: an answer to nothing that was asked: {answer}")

    def event(self, name, seconds=10):
        """Waits for the event; earlier ones of other names are dropped."""
        deadline = time.monotonic() + seconds * self.patience
        while True:
            while self.events:
                event = self.events.popleft()
                if event["event"] == name:
                    return event
            answer = self._read(max(0.01, deadline - time.monotonic()) / self.patience)
            if "event" in answer:
                self.events.append(answer)

    def close(self):
        self.socket.close()


class IperfServer:
    """An iperf3 server on this host for one client, gone afterwards."""

    def __init__(self, address, nice=0):
        self.address, self.nice = address, nice

    def __enter__(self):
        self.process = subprocess.Popen(["iperf3", "-s", "-1", "-B", self.address], stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=self._in_child)
        # Its first line of output is no sign: it is buffered.
        deadline = time.monotonic() + 10
        while not self._listening() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _in_child(self):
        die_with_parent()
        os.nice(self.nice)

    @staticmethod
    def _listening():
        with open("/proc/net/tcp", encoding="ascii") as file:
            return any(line.split()[1].endswith(f":{5201:04X}") and line.split()[3] == "0A" for line in file)

    def __exit__(self, *_):
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def pattern_file(path, size, seed=1):
    """A file of reproducible bytes that no compression or zero page stands for; returns its SHA-256."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        block = hashlib.sha512(str(seed).encode()).digest()
        for start in range(0, size, 1 << 16):
            chunk = hashlib.shake_128(block + start.to_bytes(8, "little")).digest(min(1 << 16, size - start))
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def sha256_of(path, size=None):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = size if size is not None else os.fstat(file.fileno()).st_size
        while left > 0:
            chunk = file.read(min(left, 1 << 20))
            if not chunk:
                break
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def run_checked(*words):
    result = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise Failure(f"{' '.join(words)}: {result.stderr.strip()}")
    return result.stdout


def main_summary(checks, name="e2e"):
    print(f"{name}: {checks.passed} passed, {checks.failed} failed", flush=True)
    sys.exit(1 if checks.failed else 0)
