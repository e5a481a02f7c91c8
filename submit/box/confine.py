"""Run a command with every file read-only but some folders, and with no rights left to change that.

`python confine.py CONFIG COMMAND ...` inside namespaces of its own (`unshare`), where it is root and may mount.
CONFIG: JSON with `writable` folders and `covered` ones, which are empty inside. Exit status 125 where the kernel cannot
do it.
"""
import ctypes
import json
import os
import sys

BIND, RECURSIVE = 4096, 0x8000
MOUNT_SETATTR = 442             # system call, Linux 5.12; the number is the same on all machines
READ_ONLY = 1
HERE = -100                     # AT_FDCWD: paths are as they stand
BOUNDING_DROP, SECUREBITS, NO_NEW_PRIVILEGES = 24, 28, 38  # of prctl
NO_ROOT_LOCKED = 0b11           # user 0 gets no rights by starting a program
CAPABILITIES = 64               # more than any kernel has
SHARED = b"size=1g"             # memory that processes may share as files
IMPOSSIBLE = 125

libc = ctypes.CDLL(None, use_errno=True)


class Attributes(ctypes.Structure):
    _fields_ = [("set", ctypes.c_uint64), ("clear", ctypes.c_uint64), ("propagation", ctypes.c_uint64),
                ("namespace", ctypes.c_uint64)]


def attributes(path, flags, **values):
    wanted = Attributes(**values)
    call = libc.syscall(MOUNT_SETATTR, HERE, os.fsencode(path), flags, ctypes.byref(wanted), ctypes.sizeof(wanted))
    if call:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)


def mount(source, target, kind, flags, options=None):
    if libc.mount(source and os.fsencode(source), os.fsencode(target), kind, flags, options):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)


def close(writable, covered):
    """Everything read-only but `writable` and a fresh /dev/shm; nothing in `covered`."""
    for path in covered:
        mount("tmpfs", path, b"tmpfs", 0, b"size=1m")
    if os.path.isdir("/dev/shm"):
        mount("tmpfs", "/dev/shm", b"tmpfs", 0, SHARED)
        writable = [*writable, "/dev/shm"]
    for path in writable:
        mount(path, path, None, BIND)
    attributes("/", RECURSIVE, set=READ_ONLY)
    for path in (*writable, "/proc"):  # CUDA names its threads through /proc
        attributes(path, 0, clear=READ_ONLY)


def drop_rights():
    """No capability now or later: what was mounted stays as it is."""
    for capability in range(CAPABILITIES):
        libc.prctl(BOUNDING_DROP, capability, 0, 0, 0)
    libc.prctl(SECUREBITS, NO_ROOT_LOCKED, 0, 0, 0)
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3, this process; all zero
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        config = json.load(file)
    try:
        close(config["writable"], config["covered"])
        drop_rights()
    except OSError as error:
        print("confine:", error, file=sys.stderr)
        sys.exit(IMPOSSIBLE)
    os.chdir(os.getcwd())  # into the folder as it is mounted now
    sys.exit(run(sys.argv[2:]))


def run(command):
    """Exit status of the command, 128 + its number for a signal. As the first process of a namespace it would not be
    ended by its own signals, so it is the second."""
    child = os.fork()
    if not child:
        try:
            os.execvp(command[0], command)
        except OSError as error:
            print(error, file=sys.stderr)
            os._exit(127)
    while True:  # whatever else it leaves behind is reaped, too
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main()
