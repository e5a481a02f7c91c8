"""Watches a Python process from inside through its audit events: files, network, other processes.

What it sees is written to a log, a JSON object a line, with the line of the package that did it. Writing outside the
allowed folders and going to the network is denied as well. Only the standard library is used: it runs in whatever
Python the package runs in. Native code does not pass here; the tiers below Python contain that.
"""
import json
import os
import sys
import threading

VARIABLE = "KIT_BOX"  # path of the JSON file with what is allowed
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {  # event -> which of its arguments are paths that change, where dir_fd stands, whether links are followed
    "os.remove": ((0,), 1, False), "os.rename": ((0, 1), 2, False), "os.mkdir": ((0,), 2, False),
    "os.rmdir": ((0,), 1, False), "os.link": ((0, 1), 2, True), "os.symlink": ((1,), 2, False),
    "os.truncate": ((0,), None, True), "os.chmod": ((0,), 2, True), "os.chown": ((0,), 3, True),
    "os.utime": ((0,), 3, True)}
STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty",
          "pty.spawn"}
CALLS = {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname",
         "socket.gethostbyaddr", "socket.getnameinfo", "socket.bind"}
LOCAL = {"127.0.0.1", "::1", "localhost", ""}
SOURCE = (".py", ".pyc", ".so", ".pth")
MOST = 10_000  # events of a process that are written down


class Watch:
    """Decides about each event; `allowed` as `sandbox.py` writes it."""

    def __init__(self, allowed):
        self.package = os.path.realpath(allowed["package"]) + os.sep
        self.writable = [os.path.realpath(path) for path in allowed["writable"]]
        self.readable = [os.path.realpath(path) for path in (*allowed["readable"], sys.prefix, sys.base_prefix)]
        self.hidden = set(allowed["hidden"])
        self.strict = not allowed["file_access"]  # no files at all, but those it is given
        self.quiet = allowed["quiet"]  # nothing to say about writing where it is allowed
        self.log = os.open(allowed["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.seen = set()
        self.folders = {}
        self.busy = threading.local()
        self.put("start", os.path.basename(sys.executable), "", False)

    def __call__(self, event, arguments):
        if event != "open" and event not in CHANGES and event not in STARTS and event not in CALLS:
            return
        if getattr(self.busy, "now", False):  # an event of our own doing
            return
        self.busy.now = True
        try:
            self.judge(event, arguments)
        finally:
            self.busy.now = False

    def judge(self, event, arguments):
        if event == "open":
            self.opened(*arguments)
        elif event in CHANGES:
            places, folder, follows = CHANGES[event]
            for place in places:
                self.written(self.below(arguments, place, folder), follows)
        elif event in STARTS:
            self.put("process", self.shown(event, arguments), self.line())
        else:
            self.called(event, arguments)

    def opened(self, path, mode, flags):
        if isinstance(path, int):
            return
        writes = bool(flags & WRITING) if isinstance(flags, int) else bool(set(mode or "r") & set("wax+"))
        if writes:
            self.written(path)
            return
        real = self.real(path)
        asked = os.path.abspath(os.fsdecode(os.fspath(path)))
        truth = bool(self.hidden & {*real.split(os.sep), *asked.split(os.sep)})
        own = real.startswith(self.package)
        allowed = self.within(real, self.readable) or (own and (not self.strict or real.endswith(SOURCE)))
        if allowed and not truth:
            return
        line = self.line()
        if line:  # else the judge's own reading, or a library's in a thread of its own
            self.put("truth" if truth else "read", real, line)

    def below(self, arguments, place, folder):
        """A path that is relative to an open folder, as an absolute one."""
        path = arguments[place]
        number = arguments[folder] if folder is not None and folder < len(arguments) else -1
        if not isinstance(number, int) or number < 0 or isinstance(path, int):
            return path
        return os.path.join(os.readlink("/proc/self/fd/" + str(number)), os.fsdecode(path))

    def written(self, path, follows=True):
        if isinstance(path, int):
            return
        real = self.real(path, follows)
        if real == os.devnull:
            return
        if not self.within(real, self.writable):
            self.put("write", real, self.line(importing=True), True)
            raise PermissionError(13, "writing is allowed in the output folder alone", os.fspath(path))
        if not self.quiet:
            line = self.line()
            if line:
                self.put("output", real, line)

    def called(self, event, arguments):
        asks = event.startswith("socket.get")
        address = arguments[0] if asks else arguments[1]
        if not isinstance(address, (tuple, str, bytes)):
            return  # one that is connected
        if event == "socket.bind" and (not isinstance(address, tuple) or address[0] in LOCAL):
            return  # in the file system, or how libraries ask whether there is IPv6
        if not asks and not isinstance(address, tuple) and self.own(os.fsdecode(address)):
            return  # of the program's own processes
        self.put("network", self.shown(event, (address,)), self.line(importing=True), True)
        raise PermissionError(13, "there is no network")

    def own(self, name):
        """Whether a socket of that name is the program's: in its folders, or without a file; services of the machine
        (containers, agents) listen elsewhere in the file system."""
        return not name or name[0] == "\0" or self.within(self.real(name), self.writable)

    def shown(self, event, arguments):
        text = " ".join(str(part)[:100] for part in arguments[:2] if part is not None)
        return (event + " " + text).strip()[:200]

    def real(self, path, follows=True):
        """The path with links resolved, the last one only where it `follows`; folders are remembered."""
        folder, name = os.path.split(os.path.abspath(os.fsdecode(os.fspath(path))))
        if follows and os.path.islink(os.path.join(folder, name)):
            return os.path.realpath(os.path.join(folder, name))
        if folder not in self.folders:
            self.folders[folder] = os.path.realpath(folder)
        return os.path.join(self.folders[folder], name)

    def within(self, path, folders):
        return any(path == folder or path.startswith(folder + os.sep) for folder in folders)

    def line(self, importing=False):
        """file:line of the innermost frame of the package; empty without one, and unless `importing` also where the
        package only imports a library that does it."""
        frame, imports = sys._getframe(), False
        while frame is not None:
            name = frame.f_code.co_filename
            imports = imports or name.startswith("<frozen importlib")
            if not name.startswith(("/", "<")):
                name = os.path.abspath(name)
            if name.startswith(self.package):
                return name[len(self.package):] + ":" + str(frame.f_lineno) if importing or not imports else ""
            frame = frame.f_back
        return ""

    def put(self, kind, what, line, denied=False):
        if (kind, what, line) in self.seen or len(self.seen) >= MOST:
            return
        self.seen.add((kind, what, line))
        record = json.dumps({"kind": kind, "what": what, "line": line, "denied": denied, "pid": os.getpid()})
        os.write(self.log, record.encode() + b"\n")


def install():
    """Watch this process from now on; a process that is started by it installs its own watch."""
    with open(os.environ[VARIABLE], encoding="utf-8") as file:
        sys.addaudithook(Watch(json.load(file)))
