"""The terminal that the machine was started on: its size in the guest, the escape key, and its mode when the process dies."""
import fcntl
import os
import pty
import signal
import socket
import struct
import subprocess
import termios
import time

from harness import Console, Machine, Qmp, SHELL, die_with_parent


def set_size(terminal, columns, rows):
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


class OnTerminal:
    """A machine on a pseudo-terminal of its own, run by a shell that says how it ended and whether the mode is as before."""

    def __init__(self, machine):
        self.machine = machine

    def __enter__(self):
        self.master, slave = pty.openpty()
        set_size(self.master, 80, 24)

        def in_child():
            die_with_parent()
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        # The shell keeps the terminal when the machine has died, and gives its process to signals.
        script = 'before=$(stty -g); "$@"; status=$?; [ "$(stty -g)" = "$before" ] && mode=kept; echo "ended=$status mode=$mode."'
        self.process = subprocess.Popen(["sh", "-c", script, "sh"] + self.machine.command(), stdin=slave, stdout=slave,
                                        stderr=slave, preexec_fn=in_child)
        os.close(slave)
        self.console = Console(self.master, self.master, self.machine.context.patience)
        return self

    def children(self):
        with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children", encoding="ascii") as children:
            return [int(child) for child in children.read().split()]

    def vmm(self):
        """Its process id; by then it serves QMP."""
        Qmp(self.machine.qmp_path, self.machine.context.patience).close()
        return self.children()[0]

    def end(self):
        """What the shell says of the machine's end."""
        return self.console.expect(r"ended=(\d+) mode=(\w*)\.", 20).groups()

    def __exit__(self, *_):
        if self.process.poll() is None:
            for child in self.children():
                os.kill(child, signal.SIGKILL)
        # The shell ends behind its child, which holds locks until then.
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.master)


def held(context):
    """A machine whose CPUs do not start."""
    machine = Machine(context)
    machine.words = [word for word in machine.words if word not in ("-serial", "stdio")]
    return machine.add("-S", "-chardev", "stdio,id=tty,mux=on", "-serial", "chardev:tty")


def ends(checks, context):
    with OnTerminal(held(context)) as machine:
        machine.vmm()
        os.write(machine.master, b"\x01x")
        checks.equal("control-A x ends the machine, and the terminal is as before", machine.end(), ("0", "kept"))
    for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM):
        with OnTerminal(held(context)) as machine:
            os.kill(machine.vmm(), number)
            expected = "0" if number == signal.SIGTERM else str(128 + number)
            checks.equal(f"after {number.name} the terminal is as before", machine.end(), (expected, "kept"))


def size(checks, context, root_disk):
    path = context.path("shell")
    machine = Machine(context, append=f"root=/dev/vda ro {SHELL} wisp.modules=console")
    machine.words = [word for word in machine.words if word not in ("-serial", "stdio")]
    machine.disk("rootfs", root_disk, readonly=True, options="direct=off")
    machine.add("-chardev", f"socket,id=shell,path={path},server,nowait", "-serial", "chardev:shell",
                "-device", "virtio-serial-device,id=vser", "-chardev", "stdio,id=tty,mux=on",
                "-device", "virtconsole,chardev=tty,id=hvc0")
    with OnTerminal(machine) as on_terminal:
        on_terminal.vmm()
        with socket.socket(socket.AF_UNIX) as serial:
            serial.connect(path)
            console = Console(serial.fileno(), serial.fileno(), context.patience)
            console.wait_shell()
            checks.equal("the guest's console has the terminal's size", wait_size(console, "24 80"), "24 80")
            set_size(on_terminal.master, 132, 50)
            checks.equal("and follows it", wait_size(console, "50 132"), "50 132")


def wait_size(console, expected, seconds=10):
    deadline = time.monotonic() + seconds * console.patience
    while (found := console.output_of("stty -F /dev/hvc0 size")) != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def run(checks, context, root_disk):
    ends(checks, context)
    size(checks, context, root_disk)
