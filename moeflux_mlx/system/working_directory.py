"""Keep modules in the working directory from standing in for our imports."""

# Only what Python has imported by now: anything else would be looked for there.
import os
import sys


def forget() -> None:
    """Take the working directory off the path of ``python -m moeflux_mlx...``.

    For the package's own import, before it imports anything else. The command
    ``moeflux`` has no such entry. A package that lies there itself keeps it.
    """
    pairs = zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    module = next((name for flag, name in pairs if flag == "-m"), "")
    package = __name__.partition(".")[0]
    if sys.argv[:1] != ["-m"] or module.partition(".")[0] != package:
        return
    here, home = os.getcwd(), os.path.dirname(os.path.dirname(__file__))
    if sys.path[:1] == [here] and not os.path.samefile(here, home):
        del sys.path[0]
