#!/usr/bin/python3
"""run.py --vmm PROGRAM --images DIR --root DISK [--accel kvm] [GROUP...]

Runs the end-to-end tests on this machine: inside the nested bed or on a host with hardware virtualization
(scripts/e2e chooses). DISK is a Debian root file system that may be written to. Needs root, or a user namespace with
its own network, for tap devices.
"""
import argparse
import os
import shutil
import signal
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True

import bad_input  # noqa: E402
import boots  # noqa: E402
import devices  # noqa: E402
import hostile  # noqa: E402
import terminal  # noqa: E402
import virtiofs  # noqa: E402
from harness import IN_BED, Checks, Context, main_summary  # noqa: E402

# In this order: `smp` looks for the file that `devices` wrote.
GROUPS = {
    "bad-input": lambda checks, context, root: bad_input.run(checks, context),
    "devices": devices.run,
    "smp": boots.smp_and_reboot,
    "linux64": lambda checks, context, root: boots.linux64(checks, context),
    "stratovirt": boots.stratovirt_line,
    "virtiofs": virtiofs.run,
    "kata": boots.kata_line,
    "virtual": lambda checks, context, root: boots.virtual_time(checks, context),
    "hostile": hostile.run,
    "terminal": terminal.run,
}
ONLY_SOFT = ("virtual", "hostile")
NOT_WITH_QEMU = ("bad-input", "linux64", "stratovirt", "virtiofs", "kata", "terminal")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vmm", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--root", required=True)
    parser.add_argument("--accel", default="kvm")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    options = parser.parse_args()
    unknown = set(options.groups) - set(GROUPS)
    if unknown:
        parser.error(f"unknown group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))

    checks = Checks()
    # On a real file system where there is one: direct I/O does not work on all others.
    where = "/scratch" if IN_BED else None
    work = tempfile.mkdtemp(prefix="wisp-e2e-", dir=where)
    try:
        context = Context(options.vmm, options.images, options.accel, work)
        for name in options.groups or GROUPS:
            if context.is_qemu and name in NOT_WITH_QEMU or context.accel != "soft" and name in ONLY_SOFT:
                continue
            checks.run(name, GROUPS[name], context, options.root)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    main_summary(checks)


main()
