"""Keep modules in the working directory from shadowing our imports."""

# Import only modules that are already loaded; Python would search others there.
import os
import sys


def forget() -> None:
    """Remove the working directory from the path of ``python -m moeflux_mlx...``.

    The package calls this before any other import. The command ``moeflux`` has no such
    entry. The entry stays if the package itself is in the working directory.
    """
    pairs = zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    module = next((name for flag, name in pairs if flag == "-m"), "")
    package = __name__.partition(".")[0]
    if sys.argv[:1] != ["-m"] or module.partition(".")[0] != package:
        return
    here, home = os.getcwd(), os.path.dirname(os.path.dirname(__file__))
    if sys.path[:1] == [here] and not os.path.samefile(here, home):
        del sys.path[0]
