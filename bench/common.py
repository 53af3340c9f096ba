"""What the whole-machine benchmarks share: the two VMMs' command lines, running on the host or in the nested bed, and
tables in Markdown."""
import argparse
import os
import shlex
import statistics
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True
# In the bed the folder of the end-to-end tests is /e2e.
sys.path.insert(0, "/e2e" if os.environ.get("WISP_BED") else os.path.join(ROOT, "tests/e2e"))

APPEND = "console=ttyS0 quiet tsc=reliable mitigations=off"


def parser(description):
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--vmm", default=os.path.join(ROOT, "build/release/wisp"), help="default: %(default)s")
    add("--qemu", default="/usr/bin/qemu-system-x86_64", help="the one to compare with (default: %(default)s)")
    add("--here", action="store_true", help="on this host, not in the nested bed")
    add("--images", help=argparse.SUPPRESS)
    return result


def images(*names):
    """The folder of images, with those of scripts/guest-images in it."""
    result = subprocess.run([os.path.join(ROOT, "scripts/guest-images"), *(names or ("kernel", "initrd"))], check=True,
                            stdout=subprocess.PIPE, text=True)
    return result.stdout.strip()


def in_bed(options, timeout=900):
    """On the host: runs this same program in the bed and exits with its status. In the bed, or with --here: returns."""
    if os.environ.get("WISP_BED"):
        return
    if options.here:
        options.images = options.images or images()
        return
    subprocess.run([os.path.join(ROOT, "scripts/guest-images"), "bed"], check=True, stdout=subprocess.DEVNULL)
    folder = images()
    script = os.path.basename(sys.argv[0])
    arguments = sys.argv[1:]
    shares = ["--share", f"{ROOT}/bench:/bench", "--share", f"{ROOT}/tests/e2e:/e2e"]
    for name in ("vmlinux", "bzImage", "initrd.img"):
        shares += ["--share", f"{folder}/{name}:/guest/{name}"]
    vmm = options.vmm
    if os.path.basename(vmm) == "wisp":
        shares += ["--share", f"{vmm}:/usr/local/bin/wisp"]
        vmm = "/usr/local/bin/wisp"
    command = [os.path.join(ROOT, "scripts/nested"), "--timeout", str(timeout), *shares, "--",
               "python3", f"/bench/{script}", *arguments, "--vmm", vmm, "--images", "/guest"]
    sys.exit(subprocess.run(command, check=False).returncode)


def vmm_command(program, folder, memory=256, cpus=1, kernel="vmlinux", append="", initrd="initrd.img",
                accel="kvm"):
    """One microVM with a serial console on standard output and no other device, by either VMM; `accel` is Wisp's."""
    words = ["-smp", str(cpus), "-m", str(memory), "-kernel", os.path.join(folder, kernel)]
    if initrd:
        words += ["-initrd", os.path.join(folder, initrd)]
    words += ["-append", f"{APPEND} {append}".strip(), "-serial", "stdio", "-no-reboot"]
    if is_qemu(program):
        return [program, "-M", "microvm", "-accel", "kvm", "-cpu", "host,-arch-capabilities", "-bios", "qboot.rom", "-nodefaults",
                "-no-user-config", "-display", "none", *words]
    return [program, "-machine", "microvm", "-accel", accel, *words]


def tsc_khz():
    """The rate of the host's time-stamp counter, which TCG's guests see: the kernel derives its BogoMIPS from that."""
    with open("/proc/cpuinfo", encoding="ascii") as file:
        return round(next(float(line.split(":")[1]) for line in file if line.startswith("bogomips")) * 500)


def soft_command(program, folder, append="", memory=512, cpus=1, initrd="initrd.img", cpu="Nehalem", accel="soft"):
    """One microVM on a CPU in software, Wisp's or QEMU's TCG (`cpu` is QEMU's), with a serial console."""
    words = ["-smp", str(cpus), "-m", str(memory), "-kernel", os.path.join(folder, "vmlinux"), "-initrd",
             os.path.join(folder, initrd), "-no-reboot", "-serial", "stdio"]
    if is_qemu(program):
        # Without a frequency told, this kernel cannot calibrate its clock there and hangs now and then; with a wrong
        # one its clock is wrong.
        return [program, "-M", "microvm,x-option-roms=off,rtc=on,pit=on", "-accel", "tcg", "-cpu", cpu, "-nodefaults",
                "-no-user-config", "-display", "none", *words, "-append", f"{append} tsc_early_khz={tsc_khz()}".strip()]
    return [program, "-machine", "microvm", "-accel", accel, *words, "-append", append]


def is_qemu(program):
    return os.path.basename(program).startswith("qemu")


def name_of(program):
    return "QEMU microvm" if is_qemu(program) else "Wisp"


def shown(command):
    """A command as one would type it, with program and file paths cut to their names."""
    return " ".join(shlex.quote(os.path.basename(word) if word.startswith("/") else word) for word in command)


def summary(values):
    return statistics.median(values), min(values), max(values)


def table(title, header, rows, commands=()):
    print(f"### {title}\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print()
    for command in commands:
        print(f"    {command}")
    where = "in the nested bed (QEMU TCG, SVM)" if os.environ.get("WISP_BED") else "on the host"
    print(f"\nMeasured {where} with `bench/{os.path.basename(sys.argv[0])} {shlex.join(sys.argv[1:])}`.".replace(" `.", "`."),
          flush=True)
