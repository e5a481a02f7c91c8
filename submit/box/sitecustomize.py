"""Python runs this at the start of every process that finds it on its path: those of a package that is judged."""
import os
import sys

if os.environ.get("KIT_BOX"):
    import kit_watch

    kit_watch.install()
    sys.path[:] = [path for path in sys.path if path != os.path.dirname(__file__)]  # nothing else here is for a package
